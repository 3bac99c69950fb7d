"""From trajectories to trained models: structures, rewards and the loops; inference is elsewhere."""

"""Tools that a model calls during a trajectory."""

"""Trajectories as training data, rewards, and the SFT and GRPO loops."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""How a trajectory is shown: a tree in the terminal, a live view, an HTML page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

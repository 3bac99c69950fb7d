"""Engines take token ids and return token ids, over HTTP, in this process or from a script."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

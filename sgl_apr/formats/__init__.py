"""Trajectory formats: a grammar file each, parsing, repair, conversion, and token masks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

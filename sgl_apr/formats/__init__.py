"""Trajectory formats: grammar files, parsing and error recovery, conversion, and token masks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

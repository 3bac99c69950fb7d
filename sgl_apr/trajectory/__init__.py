"""What happened in one reply: spans, engine calls, metrics, and how they are stored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

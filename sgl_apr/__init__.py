"""Adaptive parallel reasoning for SGLang.

A name is imported when it is first used: `import sgl_apr` loads neither torch nor SGLang.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Methods of reasoning with a fixed structure, under the budget and the metrics of the fork-join loop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

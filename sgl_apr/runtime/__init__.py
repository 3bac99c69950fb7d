"""The loop that decodes, forks and joins, with its budgets, policies and events."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

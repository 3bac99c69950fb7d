from .launch.launcher import Server as Server
from .local_engine import LocalEngine as LocalEngine

__all__ = [
    "LocalEngine",
    "Server",
]

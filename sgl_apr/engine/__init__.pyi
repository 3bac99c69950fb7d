from .base import Engine as Engine
from .base import GroupRequest as GroupRequest
from .base import Request as Request
from .base import Result as Result
from .http import HttpEngine as HttpEngine
from .in_process import InProcessEngine as InProcessEngine
from .load import Load as Load
from .scripted import ByteTokenizer as ByteTokenizer
from .scripted import Reply as Reply
from .scripted import ScriptedEngine as ScriptedEngine
from .sequential import SequentialEngine as SequentialEngine

__all__ = [
    "ByteTokenizer",
    "Engine",
    "GroupRequest",
    "HttpEngine",
    "InProcessEngine",
    "Load",
    "Reply",
    "Request",
    "Result",
    "ScriptedEngine",
    "SequentialEngine",
]

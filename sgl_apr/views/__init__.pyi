from .live import LiveView as LiveView
from .page import render_page as render_page
from .tree import render_tree as render_tree

__all__ = [
    "LiveView",
    "render_page",
    "render_tree",
]

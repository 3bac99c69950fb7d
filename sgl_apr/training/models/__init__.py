"""Checkpoints to try this package with: a real small model and a random tiny one; nothing is downloaded."""

from __future__ import annotations

from sgl_apr.training.models.builtin import builtin, located
from sgl_apr.training.models.description import Description, describe
from sgl_apr.training.models.pretrained import smollm2
from sgl_apr.training.models.tiny import random_llama

__all__ = ["Description", "builtin", "describe", "located", "random_llama", "smollm2"]

"""Attention and platform for servers without a GPU."""

"""Demonstrations rewritten from sequential traces."""

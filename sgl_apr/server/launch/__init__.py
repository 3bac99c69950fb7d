"""Starts SGLang servers with the defaults of this package."""

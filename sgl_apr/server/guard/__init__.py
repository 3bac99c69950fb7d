"""Refuses requests that would stop or delay the server, before SGLang and this package handle them."""

"""Joins branches in the KV cache of a server."""

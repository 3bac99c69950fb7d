"""Joining branches in the KV cache of the server."""

"""Engines: what decodes, commits and forks; nothing here knows a dialect."""

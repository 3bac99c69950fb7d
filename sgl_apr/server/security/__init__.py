"""Closes faults of SGLang by which one client of a server could harm another, and checks servers for them."""

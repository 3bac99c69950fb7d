"""Methods over HTTP."""

"""A process with limits for code that a model writes."""

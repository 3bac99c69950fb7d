"""Named sets of problems."""

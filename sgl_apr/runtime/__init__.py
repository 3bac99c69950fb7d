"""What to do next, and the loop that does it; no engine of its own."""

"""`POST /apr/fork`."""

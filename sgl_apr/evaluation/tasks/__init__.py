"""Problem types and their verifiers."""

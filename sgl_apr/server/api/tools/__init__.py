"""Tools that the client or the operator runs."""

"""The attention backend and the platform of servers without a GPU."""

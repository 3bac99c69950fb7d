"""The `sgl-apr` command, one module for each subcommand."""

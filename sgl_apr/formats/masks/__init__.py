"""Grammar rules lowered to what a grammar backend compiles into a token mask."""

"""Token masks: grammar rules lowered to what a grammar backend compiles."""

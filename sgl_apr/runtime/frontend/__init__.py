"""Runs the loop inside `@sgl.function` programs."""

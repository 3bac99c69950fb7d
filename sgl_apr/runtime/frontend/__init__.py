"""The loop inside `@sgl.function` programs."""

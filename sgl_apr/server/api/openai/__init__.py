"""OpenAI's chat completions and text completions with `apr`."""

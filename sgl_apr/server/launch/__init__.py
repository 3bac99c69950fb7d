"""Starting an SGLang server with our defaults."""

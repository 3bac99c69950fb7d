"""The patched SGLang server: platform, attention, plugin, launcher."""

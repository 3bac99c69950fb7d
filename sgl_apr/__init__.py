"""Adaptive parallel reasoning for SGLang: public names; nothing heavy is imported before it is used."""

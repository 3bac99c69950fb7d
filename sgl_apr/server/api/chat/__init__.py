"""Prompts of chats: the template, text of strangers, and the token ids of earlier turns."""

"""Bench: how fast, of what, against which ceiling; a rate counts only for tokens that are the right ones."""

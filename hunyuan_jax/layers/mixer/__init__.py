"""Sequence mixers: how a token reads the tokens before it."""

"""Chats as token ids: templates, rendering, labels."""

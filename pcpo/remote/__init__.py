"""Asking a server over HTTP for scores or for answers in words."""

"""The demo model: how the shipped weights were made."""

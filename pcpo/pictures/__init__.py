"""Pictures as files, with captions, and side by side on one sheet."""

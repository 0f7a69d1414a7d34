"""The nodes of the shipped demo models, which need no download."""

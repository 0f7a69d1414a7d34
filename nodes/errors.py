"""The error of a node that cannot do what it is asked."""

from __future__ import annotations


class NodeError(ValueError):
    """One sentence for the user: what, its value, and the remedy."""

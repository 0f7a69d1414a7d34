"""What a node says where it cannot do as asked."""

from __future__ import annotations


class NodeError(ValueError):
    """One sentence for the user: what, its value, and the remedy."""

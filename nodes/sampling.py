"""Nodes."""

NODES = ()

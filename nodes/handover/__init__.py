"""Handing the models of a graph over to the trainer, as files that it can read."""

"""The sampling nodes: the method's schedulers, SDE samplers, noise, and credit weights drawn."""

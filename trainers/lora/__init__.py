"""LoRA adapters: in a network, in a file, and under each family's names."""

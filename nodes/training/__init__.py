"""The training nodes: settings, prompts, the start of a job, its progress and its LoRA."""

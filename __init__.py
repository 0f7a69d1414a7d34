"""ComfyUI-PCPO: alignment of image models by reinforcement learning."""

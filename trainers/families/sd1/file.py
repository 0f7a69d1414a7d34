"""SD1.x's layers by their names in original checkpoints."""

from ..unet_names import original_layers

__all__ = ["original_layers"]

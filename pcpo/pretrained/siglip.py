"""SigLIP's vision tower."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from .clip import Embeds, sizes, unit
from .network import dtype_of, load_frozen
from .shapes import SiglipSpec

STEM = "vision_model."
"""Before the names in a file, but not in the network's."""


def siglip_network(spec: SiglipSpec) -> nn.Module:
    """A SigLIP's vision tower, without weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**sizes(spec.vision), image_size=spec.size, patch_size=spec.patch)
    return SiglipVisionModel(config)


class Siglip:
    """Images to embeddings of unit length."""

    def __init__(self, path: Path, spec: SiglipSpec, dtype: str) -> None:
        self.network = load_frozen(path, (STEM,), spec, lambda: siglip_network(spec), dtype, STEM)

    def __call__(self, prepared: Float[Tensor, "b 3 s s"]) -> Embeds:
        """Embed prepared images, on the network's device."""
        return unit(self.network(pixel_values=prepared.to(dtype_of(self.network))).pooler_output)

"""What the models of all families do in one way with their network and autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from . import autoencoder


class Module:
    """A base of families' models, which have a `network` and a `vae`."""

    network: Any
    vae: Any

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def decode(
        self, latents: Float[Tensor, "b c h w"], batch: int = 8
    ) -> UInt8[Tensor, "b 3 height width"]:
        """Decode clean latents in the network's scale, `batch` at a time."""
        return autoencoder.decode_images(self.vae, latents, batch)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        if enabled:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()

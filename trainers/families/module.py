"""What the models of all families do in one way with their network and autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from . import autoencoder


class Module:
    """A base of families' models, which have a `network`, a `vae` and text encoders."""

    network: Any
    vae: Any

    @property
    def text_modules(self) -> list[nn.Module]:
        raise NotImplementedError

    def place(self, device: torch.device | str, *, text_alone: bool = False) -> None:
        for module in (*self.text_modules, *(() if text_alone else (self.network, self.vae))):
            nn.Module.to(module, device=torch.device(device))  # diffusers' own `to` warns

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

"""What the models that read Qwen3-4B (Z-Image, FLUX.2 [klein]) do in one way."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from . import autoencoder
from .errors import ModelError
from .module import Module
from .spec import FamilySpec
from .text.qwen import LENGTH, Qwen3


class QwenModule(Module):
    """A base of their models, which are frozen and in eval mode.

    They have a `transformer`, a `vae`, and `text`, which is None once released.
    """

    spec: ClassVar[FamilySpec]
    native_resolution: ClassVar[tuple[int, int]] = (1024, 1024)
    transformer: Any
    text: Qwen3 | None

    def _freeze(self, attended: int) -> None:
        """Check that the text encoder fits the width of the tokens that the network attends to, and
        freeze network and autoencoder."""
        self.network = self.transformer
        for module in (self.transformer, self.vae):
            module.requires_grad_(False).eval()
        if self.text is not None and self.text.width != attended:
            raise ModelError(
                f"the network attends to prompt tokens {attended} wide and {self.text.title} gives "
                f"{self.text.width}: they belong to different models"
            )

    @property
    def max_prompt_length(self) -> int:
        """Tokens that the text encoder takes of a prompt and its template; 0 once released."""
        return 0 if self.text is None else LENGTH

    @property
    def text_modules(self) -> list[nn.Module]:
        return [] if self.text is None else [self.text.model]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of one latent; sides are multiples of 16 pixels."""
        return autoencoder.latent_shape(self.spec, width, height)

    def states(self, prompts: list[str]) -> list[Float[Tensor, "l d"]]:
        """Hidden states of prompts in their template; `RuntimeError` once released."""
        if self.text is None:
            raise RuntimeError("the text encoder was released: encode all prompts before that")
        return [self.text.encode(prompt) for prompt in prompts]

    def prompt_length(self, prompt: str) -> int:
        if self.text is None:
            raise RuntimeError("the text encoder was released: count tokens before that")
        return self.text.count(prompt)

    def release_text_encoder(self) -> None:
        self.text = None

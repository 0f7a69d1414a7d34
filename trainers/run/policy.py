"""The policy: a family's network with guidance, called the same way in rollout and update."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo import classifier_free
from ..families import Family
from ..families.embeds import Embeds

Latents = Float[Tensor, "b c h w"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A guided network.

    Attributes:
        family: the model.
        autocast: makes the context that every forward pass runs in.
        guidance_scale: of classifier-free guidance; at 1 there is one forward pass, not two.
        gradient: "both" runs both branches in one batch, with gradient through both; "conditional"
            runs them separately, with gradient through one. The rollout does the same, so that both
            run the same kernels.
        negative: embeddings of the negative prompt, one row.
    """

    family: Family
    autocast: Any
    guidance_scale: float
    gradient: str
    negative: Embeds

    def __call__(self, x: Latents, timestep: Tensor, embeds: Embeds) -> Latents:
        """The guided prediction, float32, with gradients if they are on.

        `timestep` is one for all latents, or one for each.
        """
        context: AbstractContextManager = self.autocast()
        with context:
            if self.guidance_scale == 1:
                return self.family.predict(x, timestep, embeds)
            negative = self.negative.expand(len(embeds))
            if self.gradient == "both":
                twice = timestep if timestep.ndim == 0 else timestep.repeat(2)
                pair = Embeds.joined([negative, embeds])
                both = self.family.predict(x.repeat(2, 1, 1, 1), twice, pair)
                unconditional, conditional = both.chunk(2)
            else:
                with torch.no_grad():
                    unconditional = self.family.predict(x, timestep, negative)
                conditional = self.family.predict(x, timestep, embeds)
        return classifier_free(conditional, unconditional, self.guidance_scale)

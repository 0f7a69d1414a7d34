"""The section `guard` of a run's config. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from . import bounds
from .bounds import Iterations, Prompts, Share
from .reading import json_or_text
from .sections import Section

Diversity = Literal["pixel_diversity", "ssim_diversity", "lpips_diversity"]


class GuardConfig(Section):
    """What ends a run whose images collapse, whatever the reward that it trains says of them."""

    every: int = Field(
        default=0,
        ge=0,
        le=bounds.ITERATIONS,
        description="iterations between the guard's looks at the held-out prompts; 0 is no guard",
    )
    prompts: Prompts = Field(
        default=8, description="held-out prompts it looks at, the first of run.eval_prompts"
    )
    images: int = Field(
        default=4, ge=2, le=bounds.GROUP, description="images of each, at fixed seeds"
    )
    diversity: Diversity = Field(
        default="pixel_diversity",
        description="how unlike each other the images of a prompt are; LPIPS alone needs weights",
    )
    min_diversity: Share = Field(
        default=0.5,
        description="out of bounds below this share of the base's diversity; 0 is no bound",
    )
    max_drift: Share = Field(
        default=0.0,
        description="out of bounds where images are further than this from the base's of the same "
        "prompt and seed: root mean square of pixels from 0 to 1; 0 is no bound",
    )
    reward: str | None = Field(
        default=None, description="a second reward, which is not trained on but looked at"
    )
    reward_options: tuple[str, ...] = Field(
        default=(), description="of the second reward: OPTION=VALUE, the value JSON or a text"
    )
    max_fall: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="out of bounds where the second reward is further than this below the base's, "
        "in its own units",
    )
    patience: Iterations = Field(
        default=2, description="looks out of bounds, one after the other, that end the run"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The second reward's options by name."""
        pairs = (text.partition("=") for text in self.reward_options)
        return {name: json_or_text(value, f"guard's {name}") for name, _, value in pairs}

"""The noise schedule of a diffusion model, from its scheduler config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from ...pcpo.schedules import linear_alpha_bars, scaled_linear_alpha_bars, zero_terminal_snr
from .errors import ModelError
from .source import read_config

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

# the first step has to begin where the schedule ends (Lin et al. 2023, arXiv 2305.08891)
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
"""Fields of a schedule that ends in pure noise."""

_ALPHA_BARS: dict[str, Callable[[float, float, int], Tensor]] = {
    "scaled_linear": scaled_linear_alpha_bars,
    "linear": linear_alpha_bars,
}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """A model's scheduler config; the defaults are diffusers' own for a missing field.

    Attributes:
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample".
        beta_schedule: "scaled_linear" (betas linear in their root; SD) or "linear".
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in (0, 1).
        timestep_spacing: how a sampler spreads its steps: "leading", "trailing" or "linspace".
        steps_offset: added to the timesteps of "leading".
        set_alpha_to_one: the last step arrives at alpha_bar 1, else at the schedule's first.
        rescale_betas_zero_snr: the schedule is rescaled so that it ends in pure noise.
    """

    prediction_type: str = "epsilon"
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (
            ("prediction_type", PREDICTION_TYPES),
            ("beta_schedule", tuple(_ALPHA_BARS)),
            ("timestep_spacing", SPACINGS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ModelError(
                    f"the model's {field} is {value!r}, which is not supported: "
                    f"it must be one of {', '.join(allowed)}"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Read scheduler_config.json's contents; fields that only concern sampling are left out.

        `ModelError` for a schedule or prediction that is not supported.
        """
        if config.get("trained_betas") is not None:
            raise ModelError(
                "the model's scheduler lists its own betas (trained_betas), which is not "
                "supported: describe them by beta_schedule, beta_start and beta_end"
            )
        return cls(**{k: v for k, v in config.items() if k in cls.__dataclass_fields__})

    @classmethod
    def of_folder(cls, path: Path, asked: str | None, zero_snr: bool | None) -> SchedulerConfig:
        """That of a diffusers folder; `ModelError` if it contradicts the prediction asked for.

        `zero_snr` is whether the schedule ends in pure noise; as the folder says if None.
        """
        config = read_config(path / "scheduler" / "scheduler_config.json")
        if zero_snr is not None:
            config |= ZERO_SNR if zero_snr else {"rescale_betas_zero_snr": False}
        scheduler = cls.from_dict(config)
        if asked not in (None, scheduler.prediction_type):
            raise ModelError(
                f"prediction_type is {asked!r}, but {path} says that its network predicts "
                f"{scheduler.prediction_type!r}: leave prediction_type empty for a folder"
            )
        return scheduler

    def alpha_bars(self) -> Float64[Tensor, "n"]:
        """Cumulative alphas, in [0, 1], decreasing; float64 on the CPU."""
        table = _ALPHA_BARS[self.beta_schedule]
        alpha_bars = table(self.beta_start, self.beta_end, self.num_train_timesteps)
        return zero_terminal_snr(alpha_bars) if self.rescale_betas_zero_snr else alpha_bars

    @property
    def final_alpha_bar(self) -> float | None:
        """alpha_bar after a sampler's last step, as `pcpo.schedules.ddim_grid` takes it."""
        return 1.0 if self.set_alpha_to_one else None

"""The method: PCPO and its baselines, in torch alone.

Prompt -> Trajectory (rollout) -> reward -> advantage -> log ratio -> objective. Nothing here knows
a model library; a network is any `denoiser(x, timestep) -> prediction`.

Shapes: b images in a batch, n steps of a sampler, k of them trained; `*d` is one latent, (c, h, w)
for SD and (tokens, c) for packed FLUX latents. Every inner product, squared norm and log-density
is a MEAN over the latent's elements, as in all published code (the clip range 1e-4 belongs to it).

Equation and proposition numbers are those of Lee and Ye, "PCPO: Proportionate Credit Policy
Optimization for Aligning Image Generation Models", ICLR 2026, arXiv:2509.25774.
"""

from .advantages import ADVANTAGES, combine_advantages
from .credit import (
    CREDITS,
    Credit,
    native_weights,
    solved_std,
)
from .guidance import classifier_free, implicit_reward
from .objectives import OBJECTIVES, Hinge, LogHinge, PpoClip
from .plan import Plan, plan_diffusion, plan_flow
from .predictions import PREDICTIONS
from .ratios import RATIOS, epsilon_matching, kl_divergence
from .rollout import noise_streams, rollout
from .schedules import DiffusionGrid, FlowGrid, ddim_grid, flow_grid
from .selection import SELECTIONS
from .trajectory import Trajectory
from .transitions import TRANSITIONS, Cps, DanceSde, Ddim, FlowSde

__all__ = [
    "ADVANTAGES",
    "CREDITS",
    "OBJECTIVES",
    "PREDICTIONS",
    "RATIOS",
    "SELECTIONS",
    "TRANSITIONS",
    "Cps",
    "Credit",
    "DanceSde",
    "Ddim",
    "DiffusionGrid",
    "FlowGrid",
    "FlowSde",
    "Hinge",
    "LogHinge",
    "Plan",
    "PpoClip",
    "Trajectory",
    "classifier_free",
    "combine_advantages",
    "ddim_grid",
    "epsilon_matching",
    "flow_grid",
    "implicit_reward",
    "kl_divergence",
    "native_weights",
    "noise_streams",
    "plan_diffusion",
    "plan_flow",
    "rollout",
    "solved_std",
]

"""The method: PCPO and its baselines, in torch alone.

Prompt -> Trajectory (rollout) -> reward -> advantage -> log ratio -> objective. Nothing here knows
a model library; a network is any `denoiser(x, timestep) -> prediction`.

Shapes: b images in a batch, n steps of a sampler, k of them trained; `*d` is one latent, (c, h, w)
for SD and (tokens, c) for packed FLUX latents. Every inner product, squared norm and log-density
is a MEAN over the latent's elements, as in all published code (the clip range 1e-4 belongs to it).

Equation and proposition numbers are those of Lee and Ye, "PCPO: Proportionate Credit Policy
Optimization for Aligning Image Generation Models", ICLR 2026, arXiv:2509.25774.
"""

from ..registry import ADVANTAGES, CREDITS, KLS, OBJECTIVES, RATIOS, SELECTIONS, TRANSITIONS
from .advantages import (
    BatchAdvantage,
    GroupAdvantage,
    RunningAdvantage,
    combine_advantages,
)
from .credit import (
    Credit,
    CreditRule,
    Exact,
    Native,
    ObjectiveOnly,
    Proportionate,
    Published,
    Relative,
    WeightedLoss,
    native_weights,
    solved_std,
)
from .guidance import classifier_free, implicit_reward
from .objectives import ClipRange, Hinge, LogHinge, PpoClip, Terms
from .per_sample import SampleGradients
from .plan import Plan, deterministic, plan_diffusion, plan_flow
from .predictions import PREDICTIONS
from .ratios import StepBatch, epsilon_matching, kl_divergence, weighted_log_ratio
from .rollout import Denoiser, noise_streams, rollout, rollout_with_gradient
from .schedules import (
    FLOW_GRIDS,
    SPACINGS,
    DiffusionGrid,
    FlowGrid,
    ddim_grid,
    flow_grid,
    linear_alpha_bars,
    resolution_shift,
    scaled_linear_alpha_bars,
    zero_terminal_snr,
)
from .selection import AllSteps, RandomFraction, SlidingWindow
from .trajectory import Trajectory, concatenate
from .transitions import Cps, DanceSde, Ddim, FlowSde, Transition

__all__ = [
    "ADVANTAGES",
    "CREDITS",
    "FLOW_GRIDS",
    "KLS",
    "OBJECTIVES",
    "PREDICTIONS",
    "RATIOS",
    "SELECTIONS",
    "SPACINGS",
    "TRANSITIONS",
    "AllSteps",
    "BatchAdvantage",
    "ClipRange",
    "Cps",
    "Credit",
    "CreditRule",
    "DanceSde",
    "Ddim",
    "Denoiser",
    "DiffusionGrid",
    "Exact",
    "FlowGrid",
    "FlowSde",
    "GroupAdvantage",
    "Hinge",
    "LogHinge",
    "Native",
    "ObjectiveOnly",
    "Plan",
    "PpoClip",
    "Proportionate",
    "Published",
    "RandomFraction",
    "Relative",
    "RunningAdvantage",
    "SampleGradients",
    "SlidingWindow",
    "StepBatch",
    "Terms",
    "Trajectory",
    "Transition",
    "WeightedLoss",
    "classifier_free",
    "combine_advantages",
    "concatenate",
    "ddim_grid",
    "deterministic",
    "epsilon_matching",
    "flow_grid",
    "implicit_reward",
    "kl_divergence",
    "linear_alpha_bars",
    "native_weights",
    "noise_streams",
    "plan_diffusion",
    "plan_flow",
    "resolution_shift",
    "rollout",
    "rollout_with_gradient",
    "scaled_linear_alpha_bars",
    "solved_std",
    "weighted_log_ratio",
    "zero_terminal_snr",
]

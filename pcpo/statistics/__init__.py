"""Statistics of measurements: intervals, mixed models, corrections. numpy alone."""

from .bootstrap import bootstrap, estimate
from .design import Design, Factor, design_of
from .holm import holm
from .mixed_model import Coefficient, MixedModel, fit_mixed_model
from .two_way import two_way_interval
from .wilson import Rate, win_rate

__all__ = [
    "Coefficient",
    "Design",
    "Factor",
    "MixedModel",
    "Rate",
    "bootstrap",
    "design_of",
    "estimate",
    "fit_mixed_model",
    "holm",
    "two_way_interval",
    "win_rate",
]

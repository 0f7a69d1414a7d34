"""The families of models that are trained, by the names that ComfyUI, configs and users have."""

from __future__ import annotations

from typing import Any

from ..trainers.config.train_config import DEMOS as DEMO_SOURCES
from .demo.nodes import DEMOS as FOLDERS
from .demo.nodes import demo_id_of

SD1, SD3, FLUX = "sd1", "sd3", "flux"

TITLES = {SD1: "SD1.x", SD3: "SD3.5", FLUX: "FLUX"}
"""What users call them."""

CLASSES = {"SD15": SD1, "SD3": SD3, "Flux": FLUX}
"""By the name of ComfyUI's class; models of other classes are not trained."""

SOURCES = {"demo-flow": SD3, "demo": SD1, "sd1": SD1, "sd3": SD3, "flux": FLUX}
"""By how `model.source` of a preset begins, the longest first."""

DEMOS = {
    demo: source
    for demo, folder in FOLDERS.items()
    for source, shipped in DEMO_SOURCES.items()
    if folder == shipped
}
"""`model.source` of a demo model, by its id."""


def class_of(model: Any) -> str:
    """The name of ComfyUI's class of a MODEL."""
    return type(model.model.model_config).__name__


def family_of_model(model: Any) -> str | None:
    """The family of a MODEL; None where it is not trained here."""
    return CLASSES.get(class_of(model))


def base_of(model: Any) -> str | None:
    """What a LoRA for a MODEL is made for: a demo model, or a family; None for other models."""
    demo = demo_id_of(model)
    return family_of_model(model) if demo is None else DEMOS[demo]


def base_title(base: str | None) -> str:
    """A base with its article.

    >>> base_title("demo"), base_title("flux")
    ("PCPO Demo Model's tiny-sd", 'a FLUX model')
    """
    for demo, source in DEMOS.items():
        if base == source:
            return f"PCPO Demo Model's {demo}"
    title = TITLES.get(base or "", "another")
    return title if base not in TITLES else f"{'an' if title[0] == 'S' else 'a'} {title} model"


def family_of_source(source: str) -> str | None:
    """The family that a preset is for.

    >>> family_of_source("sd15"), family_of_source("demo-flow"), family_of_source("/a/b.ckpt")
    ('sd1', 'sd3', None)

    Args:
        source: `model.source` of the preset.

    Returns:
        The family; None for a path.
    """
    return next((family for name, family in SOURCES.items() if source.startswith(name)), None)

"""The families of models that are trained, by ComfyUI's classes."""

from __future__ import annotations

from typing import Any

from ..trainers.config.train_config import DEMOS as DEMO_SOURCES
from ..trainers.families.registry import FAMILIES
from ..trainers.families.spec import FamilySpec
from .demo.nodes import DEMOS as FOLDERS
from .demo.nodes import demo_id_of

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


def spec_of_network(network: Any) -> FamilySpec | None:
    """The family of a MODEL's `model`; None where it is not trained here."""
    kind = type(getattr(network, "model_config", None)).__name__
    return next((spec for spec in FAMILIES.values() if kind in spec.comfyui.classes), None)


def family_of_model(model: Any) -> str | None:
    """The family of a MODEL; None where it is not trained here."""
    spec = spec_of_network(model.model)
    return None if spec is None else spec.name


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
    if base not in FAMILIES:
        return "another"
    title = FAMILIES[base].title
    return f"{'an' if title[0] == 'S' else 'a'} {title} model"

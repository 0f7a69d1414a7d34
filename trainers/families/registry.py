"""All model families: a new one is a folder and its line here. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ModelError
from .flux.spec import FLUX
from .header import Header, judge_lora, judge_unknown
from .klein.spec import KLEIN
from .sd1.spec import SD1
from .sd3.spec import SD3
from .sdxl.spec import SDXL
from .spec import FamilySpec
from .zimage.spec import ZIMAGE

# the first that takes a file has it: FLUX.2 before FLUX.1, whose blocks have the same names
_ALL = (SD1, SDXL, SD3, KLEIN, FLUX, ZIMAGE)
FAMILIES: dict[str, FamilySpec] = {spec.name: spec for spec in _ALL}


def supported_models() -> str:
    """A sentence on the models that can be trained."""
    return f"Supported here: text-to-image models of {_join_words(s.models for s in _specs())}"


def titles(option: str) -> str:
    """The families that take an option of the config's section `model`.

    >>> titles("t5_length")
    'SD3.5 and FLUX'
    """
    return _join_words(spec.title for spec in _specs() if option in spec.options)


def family_of_header(header: Header) -> str:
    """The family of a checkpoint or of a network alone; `ModelError` if it is unusable."""
    judge_lora(header)
    for spec in _specs():
        if spec.takes(header):
            spec.judge(header)
            return spec.name
    raise judge_unknown(header, supported_models())


def families_of_lora(names: Iterable[str]) -> tuple[str, ...]:
    """The families that a LoRA may be made for, by its names; empty if they tell nothing.

    >>> families_of_lora(["lora_unet_down_blocks_0_attentions_0_proj_in.alpha"])
    ('sd1',)
    >>> families_of_lora(["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff.alpha"])
    ('sd1', 'sdxl')
    """
    there, specs = list(names), list(_specs())
    for level in range(max(len(spec.lora_layers) for spec in specs)):
        telling = [spec for spec in specs if level < len(spec.lora_layers)]
        known = {spec.name: re.compile(spec.lora_layers[level]) for spec in telling}
        made = tuple(name for name, layers in known.items() if any(map(layers.search, there)))
        if made:
            return made
    return ()


def family_of_config(config: Mapping[str, Any], path: str, name: str) -> FamilySpec:
    """The family of a diffusers folder, by its network's config; `ModelError` if it is unusable.

    Args:
        path: of the folder, for messages.
        name: of the network, for messages.
    """
    for spec in _specs():
        if spec.takes_config(config):
            spec.judge_config(config, name)
            return spec
    kind = config.get("_class_name", "a model of unknown kind")
    if config.get("cross_attention_dim") == 1024:
        kind = "SD2.x"
    raise ModelError(f"the model in {path} is {kind}, which is not supported. {supported_models()}")


def spec_of_class(names: Iterable[str], config: Mapping[str, Any] | None) -> FamilySpec | None:
    """The family of a network, by its classes of diffusers and its config, if it has one."""
    known = {*names}
    for spec in _specs():
        about = None if config is None else {**config, "_class_name": spec.class_name}
        if spec.class_name in known and (about is None or spec.takes_config(about)):
            return spec
    return None


def spec_of_source(source: str) -> FamilySpec | None:
    """The family of a demo model or of a preset's name of a model; None for a path.

    >>> [getattr(spec_of_source(s), "name", None) for s in ("sd15", "demo-flow", "/a/b.ckpt")]
    ['sd1', 'sd3', None]
    """
    return next((spec for spec in _specs() if source in {*spec.checkpoints, *spec.demos}), None)


def demo_like(name: str) -> str:
    """`model.source` of a demo model that is of the same kind, flow or diffusion, as a family."""
    kind = FAMILIES[name].is_flow
    return next(demo for spec in _specs() if spec.is_flow == kind for demo in spec.demos)


def _specs() -> Iterable[FamilySpec]:
    return FAMILIES.values()


def _join_words(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last

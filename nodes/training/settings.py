"""Widgets made from the fields of `TrainConfig`, and back.

A preset is a choice that brings the widgets with its own values as their defaults. A widget is
called `section_field`. Where a number may be None, a word stands for that in its place (0 in
workflows of before); tuples are text with commas.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from comfy_api.latest import io
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ...registry import samplers
from ...trainers.config.sections import TrainFields
from ...trainers.config.train_config import (
    FORMER_NAMES,
    ConfigError,
    presets,
    read_preset,
    validate,
)
from ...trainers.families.registry import FAMILIES, spec_of_source
from ...trainers.job.preflight import why_not_distilled
from .. import sockets
from ..errors import NodeError
from ..handover.flow import origin_of
from ..names import NODE_ID

Values = dict[str, Any]
"""Sections and fields, as JSON has them."""

MAIN = (
    "run.iterations",
    "prompts.per_iteration",
    "prompts.images_per_prompt",
    "sampler.steps",
    "sampler.guidance_scale",
    "optimizer.lr",
    "trainable.rank",
    "trainable.alpha",
    "model.precision",
    "model.gradient_checkpointing",
    "run.micro_batch",
    "run.save_every",
    "run.seed",
    "guard.every",
)
"""The settings that matter, in the order of the node; the others are advanced."""

ELSEWHERE = {
    "model.source",
    "model.prediction_type",
    "model.zero_terminal_snr",
    "model.clip_skip",
    "model.allow_download",
    "model.text_encoders",
    "model.vae",
    "model.t5_tokenizer",
    "model.qwen_tokenizer",
    "model.t5_length",
    "method.mean_over",
    "method.solve_weight",
    "trainable.kind",
    "trainable.init_lora",
    "trainable.shard",
    "prompts.source",
    "prompts.held_out",
    "run.cache",
    "run.device",
    "run.publish",
    "guard.reward",
    "guard.reward_options",
}
"""What other nodes, ComfyUI itself and the preset decide."""

FLOW = {
    *("sampler.grid", "sampler.shift", "sampler.whole_timesteps"),
    *("trainable.ema_every", "trainable.ema_ramp"),
}
"""Settings that the presets of flow models alone show."""
DIFFUSION = {"sampler.spacing"}
"""Settings that they do not show."""

MEMORY = {"model.base", "model.offload", "optimizer.kind", "run.store_on"}
"""What makes a large model fit on a small card, which the presets of large ones alone show."""

FIRST = (
    *("demo", "sd15-8gb", "sdxl-12gb", "sdxl-24gb", "sdxl-illustrious", "sdxl-illustrious-v"),
    *("demo-flow", "sd35-16gb", "flux-24gb", "zimage-16gb", "klein-16gb"),
    *("demo-flow-fast", "sd35-16gb-fast", "flux-24gb-fast", "zimage-16gb-fast", "klein-16gb-fast"),
    *("demo-taste", "sd15-taste"),
)
"""Presets at the top of the list."""

OFFLINE = ["pixel_diversity", "ssim_diversity"]
"""Diversities that need no weights, which a job would not look for in ComfyUI's folders."""

LATER = (
    *("method.kl_fraction", "method.window_move", "method.window_start"),
    *("taste.ask_every", "taste.pairs"),
    *("sampler.branches", "sampler.branch_at", "advantage.among"),
)
"""Settings that came after workflows had been saved: last, as those say values by their place."""

WORDS = {"guard.max_fall": sockets.OFF}
"""What stands for None, if it is not "auto"."""
LOCALE = Path(__file__).parents[2] / "locales" / "en" / "nodeDefs.json"

OF_DDIM = ("published", "exact")
"""Kinds of credit that change DDIM's noise."""


@cache
def offered_presets() -> tuple[str, ...]:
    """Presets that train a LoRA of a model that ComfyUI hands over, those for everyone first."""
    loras = [name for name in presets() if read_preset(name).trainable.kind == "lora"]
    fit = [name for name in loras if FAMILIES[family_of_preset(name)].comfyui.classes]
    first = [name for name in FIRST if name in fit]
    return (*first, *(name for name in fit if name not in FIRST))


@cache
def family_of_preset(name: str) -> str:
    """The family of models that a preset is for."""
    return _family_of(read_preset(name).model.source)


def _family_of(source: str) -> str:
    spec = spec_of_source(source)
    return spec.name if spec is not None else next(iter(FAMILIES))


def check_family(values: Values, family: str) -> None:
    """Refuse settings whose preset is for another family."""
    wanted = _family_of(values["model"]["source"])
    if wanted != family:
        fitting = ", ".join(name for name in offered_presets() if family_of_preset(name) == family)
        raise NodeError(
            f"the preset of the settings is for {FAMILIES[wanted].title} models and this MODEL is "
            f"{FAMILIES[family].title}; choose one of {fitting} in PCPO Training Settings"
        )


def check_distilled(model: Any, values: Values, family: str) -> None:
    """Refuse a MODEL whose file says that it is distilled, unless the settings allow it."""
    spec = FAMILIES[family]
    for file in () if values["model"]["train_distilled"] else origin_of(model) or ():
        if spec.is_distilled(file):
            setting = "model_train_distilled in PCPO Training Settings"
            raise NodeError(why_not_distilled(spec, file.name, setting))


def fields(family: str) -> dict[str, FieldInfo]:
    """The config's fields that are widgets, by "section.field", the main ones first."""
    found = {}
    for section, outer in TrainFields.model_fields.items():
        if isinstance(outer.annotation, type) and issubclass(outer.annotation, BaseModel):
            inner = outer.annotation.model_fields
            found |= {f"{section}.{name}": field for name, field in inner.items()}
    spec = FAMILIES[family]
    hidden = (DIFFUSION if spec.is_flow else FLOW) | (set() if spec.is_large else MEMORY)
    hidden |= {f"model.{name}" for s in FAMILIES.values() for name in s.options - spec.options}
    others = {*MAIN, *ELSEWHERE, *hidden, *LATER}
    rest = [path for path in found if path not in others]
    return {path: found[path] for path in (*MAIN, *rest, *LATER)}


def preset_input() -> Any:
    """The choice of a preset, each with its widgets."""
    options = [io.DynamicCombo.Option(name, widgets(name)) for name in offered_presets()]
    return io.DynamicCombo.Input(
        "preset",
        options=options,
        tooltip="Sets all values below; each preset is for one family of models. demo and "
        "demo-flow: the demo models, in minutes on any computer. sd15-8gb, sdxl-12gb, sd35-16gb, "
        "flux-24gb, zimage-16gb, klein-16gb and so on: SD1.5, SDXL, SD3.5, FLUX, Z-Image or "
        "FLUX.2 [klein] on a graphics card with that much memory. sdxl-illustrious: Illustrious, "
        "NoobAI and Pony, whose prompts are tags; with -v for v-prediction models. -fast: images "
        "of a prompt share the start of their way, and three steps are trained at a time; a "
        "third to a half less time to the same reward, measured on demo-flow alone. demo-taste, "
        "sd15-taste: for your own taste (PCPO Taste); they ask for votes while they train, and "
        "stay near the base. The others are the paper's experiments, named by model and reward. "
        "Names that end in ddpo, dancegrpo or "
        "flowgrpo are its baselines, named by method too.",
        extra_dict={"former_names": FORMER_NAMES},  # for the frontend, which opens old workflows
    )


def widgets(preset: str) -> list[Any]:
    """The widgets of all fields with a preset's values as their defaults."""
    values, family = read_preset(preset).model_dump(mode="json"), family_of_preset(preset)
    made = [_widget(path, f, _value(values, path)) for path, f in fields(family).items()]
    is_flow = FAMILIES[family].is_flow
    for widget in made:
        if widget.id == "sampler_transition" and is_flow:
            widget.options = samplers(is_flow=True)
        if widget.id == "method_credit" and is_flow:
            widget.options = [name for name in widget.options if name not in OF_DDIM]
        if widget.id == "guard_diversity":
            widget.options = OFFLINE
    return made


def values_of(preset: Mapping[str, Any]) -> Values:
    """A preset with what was changed on the node.

    Args:
        preset: the choice's name under "preset", and the widgets' values.
    """
    name = preset["preset"]
    values, known = read_preset(name).model_dump(mode="json"), fields(family_of_preset(name))
    for path, field in known.items():
        if (given := preset.get(_id(path))) is not None:
            section, _, inner = path.partition(".")
            values[section][inner] = _read(path, field, given)
    try:
        return validate(values, "the settings").model_dump(mode="json")
    except ConfigError as error:
        text = "; ".join(str(error).splitlines())
        raise NodeError(f"{text}{_labels_in(text, known)}") from error


def _labels_in(text: str, known: Mapping[str, FieldInfo]) -> str:
    """What the fields that a text names are called on the node."""
    named = [path for path in known if re.search(rf"(?<![\w.]){re.escape(path)}\b", text)]
    labels = ", ".join(_labels()[f"preset_{_id(path)}"]["name"] for path in named)
    return f" (on the node: {labels})" if named else ""


@cache
def _labels() -> dict[str, dict[str, str]]:
    return json.loads(LOCALE.read_text("utf-8"))[NODE_ID]["inputs"]


# --- one widget ----------------------------------------------------------------------------------


def _id(path: str) -> str:
    return path.replace(".", "_")


def _value(values: Values, path: str) -> Any:
    section, _, inner = path.partition(".")
    return values[section][inner]


def _kind(field: FieldInfo) -> tuple[Any, bool]:
    """A field's type, and whether it may be None."""
    kind = field.annotation
    parts = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next(part for part in parts if part is not type(None)), type(None) in parts


def _widget(path: str, field: FieldInfo, default: Any) -> Any:
    kind, is_optional = _kind(field)
    about: dict[str, Any] = {
        "optional": True,
        "tooltip": _tooltip(path, field, is_optional),
        "advanced": path not in MAIN,
    }
    if get_origin(kind) is Literal and isinstance(default, str):
        return io.Combo.Input(_id(path), options=list(get_args(kind)), default=default, **about)
    if kind is bool:
        return io.Boolean.Input(_id(path), default=default, **about)
    if kind is str:
        return io.String.Input(_id(path), default=default or "", **about)
    if get_origin(kind) is tuple:
        return io.String.Input(_id(path), default=", ".join(map(str, default)), **about)
    if is_optional:
        word = WORDS.get(path, sockets.AUTO)
        return sockets.number_or_word(_id(path), word, default=default, unset=0, **about)
    low, high = _range(field, int if kind is not float else float)
    number = {"default": default or 0, "min": low, "max": high}
    if kind is float:
        step = _step(float(default or 0))
        return io.Float.Input(_id(path), **number, step=step, round=False, **about)
    return io.Int.Input(_id(path), **number, **about)


def _tooltip(path: str, field: FieldInfo, is_optional: bool) -> str:
    text = field.description or path
    if is_optional and path in WORDS:
        text += f"; {WORDS[path]}: it is not looked at"
    elif is_optional:
        text = text.replace("if not set, ", f"{sockets.AUTO}: ")
    else:
        text = text.replace("if not set, ", "if empty, ")
    return f"{text[0].upper()}{text[1:]}. Config field: {path}."


def _range(field: FieldInfo, kind: Any) -> tuple[Any, Any]:
    """The widget's ends; where the field's own end is not allowed itself, the config says so."""
    kind_, _ = _kind(field)
    if get_origin(kind_) is Literal:
        return min(get_args(kind_)), max(get_args(kind_))
    ends = field.metadata
    low = next(
        end.ge if isinstance(end, Ge) else end.gt for end in ends if isinstance(end, Ge | Gt)
    )
    high = next(
        end.le if isinstance(end, Le) else end.lt for end in ends if isinstance(end, Le | Lt)
    )
    return kind(low), kind(high)


def _step(default: float) -> float:
    """What a click changes: a tenth of large values, a hundredth of small ones.

    It is also the last digit that is shown, so that all digits of the default are.

    >>> _step(5.0), _step(1e-4), _step(0.999), _step(0.0)
    (0.1, 1e-06, 0.001, 0.001)
    """
    if default <= 0:
        return 0.001
    size = min(math.floor(math.log10(default)), 0) - (2 if default < 0.01 else 1)
    last = Decimal(str(default)).normalize().as_tuple().exponent
    return 10.0 ** min(size, int(last))


def _read(path: str, field: FieldInfo, given: Any) -> Any:
    kind, is_optional = _kind(field)
    if get_origin(kind) is tuple:
        return [part.strip() for part in given.split(",") if part.strip()]
    if not is_optional:
        return given
    if kind is str:
        return given or None
    return sockets.number_of(given, path, WORDS.get(path, sockets.AUTO)) or None

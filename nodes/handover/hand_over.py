"""From what ComfyUI has loaded to a model that the trainer loads: the same numbers.

Where nothing was changed, the file they came from; else a copy with all patches merged in, beside
the job. The demo model is known by its tag.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...trainers.errors import UserError
from ...trainers.families.registry import FAMILIES
from ...trainers.families.source import inspect_source, read_config
from ...trainers.families.text.header import TOKENIZERS
from ..demo.nodes import DEMOS, demo_id_of
from ..errors import NodeError
from ..families import base_of
from .demo import demo_weights, write_demo
from .flow import PICKLES, files_of_parts, fp8_note, header_of_file, model_section, write_parts
from .judge import Judged, asked_shift, encoders_of, judge
from .write import Tick, checkpoint_of, write_checkpoint

NAME = "model"
"""Of the copy in a job's folder."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A model as the trainer's config names it.

    Attributes:
        base: what the LoRA is for: a demo model or a family (`kinds.base_of`).
        model: fields of the config's section `model`.
        shift: that it is to be trained at (`asked_shift`).
        notes: what the user should know, one sentence each.
    """

    base: str
    model: dict[str, Any]
    shift: float | None = None
    notes: tuple[str, ...] = ()


def hand_over(model: Any, clip: Any, vae: Any, folder: Path, tick: Tick) -> HandedOver:
    """Make what is loaded available to a worker.

    Args:
        model: a MODEL, with LoRAs or without.
        folder: where a copy is written, if one is needed.

    Returns:
        Where the model is; `NodeError` where it cannot be trained (`judge`).
    """
    found, base = judge(model, clip, vae), base_of(model)
    assert base is not None  # for it was judged
    demo = demo_id_of(model)
    if demo is not None:
        return _hand_over_demo(found, base, (model, clip, vae), DEMOS[demo], folder)
    if FAMILIES[found.family].judge_parts is not None:
        return _hand_over_parts(found, base, (model, clip, vae), folder, tick)
    file = None if found.is_quantised else common_file(model, clip, vae)
    if file is not None:
        return HandedOver(base, {**found.kind, "source": str(file)})
    copy = folder / f"{NAME}.safetensors"
    write_checkpoint(copy, checkpoint_of(model, clip, vae, _kept_layers(clip)), tick)
    return HandedOver(base, {**found.kind, "source": str(copy)}, notes=(*found.notes, _note(copy)))


def copied_bytes(model: Any, clip: Any, vae: Any) -> float:
    """The size of the copy that `hand_over` would write, about; 0 where it writes none."""
    found = judge(model, clip, vae)
    patchers = (model, clip.patcher, vae.patcher)
    if demo_id_of(model) is not None:
        return 0.0
    if FAMILIES[found.family].judge_parts is not None:
        files: tuple[Any, ...] = files_of_parts(model, clip, vae)
    else:
        files = (None if found.is_quantised else common_file(model, clip, vae),) * 3
    missing = [patcher for patcher, file in zip(patchers, files, strict=True) if file is None]
    return (2.0 if found.is_quantised else 1.0) * sum(patcher.model_size() for patcher in missing)


def _hand_over_parts(
    found: Judged, base: str, given: tuple[Any, Any, Any], folder: Path, tick: Tick
) -> HandedOver:
    model, clip, vae = given
    copy, notes = folder / f"{NAME}.safetensors", found.notes
    parts = files_of_parts(model, clip, vae)
    if not notes and (stored := fp8_note(parts)):
        notes = (stored,)
    if None in parts:
        write_parts(parts, model, clip, vae, copy, tick)
        notes = (*notes, _note(copy))
    spec, about = FAMILIES[found.family], {**found.kind, **model_section(parts, copy)}
    if "clip_skip" in spec.settings and clip.layer_idx is not None:
        about["clip_skip"] = -clip.layer_idx
    for kind, tokenizer in TOKENIZERS.items():
        if kind in encoders_of(clip):
            about[tokenizer.field] = comfyui_tokenizer(tokenizer.in_comfyui)
    return HandedOver(base, about, asked_shift(model) if spec.is_flow else None, notes)


def comfyui_tokenizer(name: str) -> str | None:
    """ComfyUI's own folder with a tokenizer; None where it is not there any more."""
    import comfy.text_encoders.t5

    folder = Path(comfy.text_encoders.t5.__file__).parent / name
    return str(folder) if folder.is_dir() else None


def _judge_demo(found: Judged, demo: Path) -> None:
    own = read_config(demo / "scheduler" / "scheduler_config.json")["prediction_type"]
    kind = found.kind["prediction_type"]
    if kind != own or found.kind["zero_terminal_snr"]:
        raise NodeError(
            f"a ModelSampling node changes the demo model's prediction, {own!r}, to {kind!r}, or "
            "its schedule; connect the MODEL from before that node"
        )


def _hand_over_demo(
    found: Judged, base: str, given: tuple[Any, Any, Any], demo: Path, folder: Path
) -> HandedOver:
    is_flow = FAMILIES[found.family].is_flow
    if not is_flow:
        _judge_demo(found, demo)
    shift = asked_shift(given[0]) if is_flow else None
    weights = demo_weights(*given, demo)
    if weights is None:
        return HandedOver(base, {"source": base}, shift)
    copy = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_demo(demo, weights, copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return HandedOver(base, {"source": str(copy)}, shift, (MERGED,))


MERGED = "the base is the model as loaded, LoRAs included"


def _note(copy: Path) -> str:
    return f"{MERGED}; its copy takes {copy.stat().st_size / 1e6:.0f} MB in the job's folder"


# --- the file it came from -----------------------------------------------------------------------


def common_file(model: Any, clip: Any, vae: Any) -> Path | None:
    """The checkpoint that all three were loaded from, where they are still as in there.

    Returns:
        The file, or None where there is none that the trainer reads to the same numbers.
    """
    if clip.layer_idx not in (None, -1):
        return None
    files = {source_file(part) for part in (model, clip.patcher, vae.patcher)}
    file = files.pop() if len(files) == 1 else None
    return file if file is not None and _is_readable(file) else None


def source_file(patcher: Any) -> Path | None:
    """The checkpoint that a part of a model was loaded from; None where it was changed since."""
    loaded = getattr(patcher, "cached_patcher_init", None)
    if not loaded or patcher.patches or not loaded[1]:
        return None
    function: Callable[..., Any] = loaded[0]
    path = loaded[1][0]
    is_checkpoint = "checkpoint" in function.__name__ and isinstance(path, str)
    return Path(path) if is_checkpoint and Path(path).is_file() else None


def _is_readable(file: Path) -> bool:
    """Whether the trainer can read it: a whole checkpoint without pickled code."""
    try:
        inspect_source(file)
        if file.suffix.lower() in PICKLES:
            header_of_file(file)
    except UserError:
        return False
    return True


def _kept_layers(clip: Any) -> int | None:
    """Layers of the text encoder that are used, where CLIP Set Last Layer skips some.

    What ComfyUI then does, taking an earlier layer's output through the last norm, is what a
    shorter encoder does.
    """
    if clip.layer_idx in (None, -1):
        return None
    count = clip.cond_stage_model.clip_l.num_layers
    return count + clip.layer_idx + 1 if -clip.layer_idx <= count else None

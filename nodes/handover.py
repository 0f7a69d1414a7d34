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

from ..trainers.config import DEMO_FOLDER
from ..trainers.errors import UserError
from ..trainers.families.source import inspect_source, read_config
from .demo import DEMOS, demo_id_of
from .errors import NodeError
from .handover_demo import demo_weights, write_demo
from .handover_judge import Judged, judge
from .handover_write import Tick, checkpoint_of, write_checkpoint

NAME = "model"
"""Of the copy in a job's folder."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A model as the trainer's config names it.

    Attributes:
        source: `model.source` of the config.
        prediction_type: `model.prediction_type` of it.
        notes: what the user should know, one sentence each.
    """

    source: str
    prediction_type: str
    notes: tuple[str, ...] = ()


def hand_over(model: Any, clip: Any, vae: Any, folder: Path, tick: Tick) -> HandedOver:
    """Make what is loaded available to a worker.

    Args:
        model: a MODEL, with LoRAs or without.
        clip: a CLIP.
        vae: a VAE.
        folder: where a copy is written, if one is needed.
        tick: told how far the copy is.

    Returns:
        Where the model is; `NodeError` where it cannot be trained (`judge`).
    """
    found = judge(model, clip, vae)
    demo = demo_id_of(model)
    if demo is not None:
        _judge_demo(found, DEMOS[demo])
        return _hand_over_demo(model, clip, vae, DEMOS[demo], folder)
    file = None if found.is_quantised else common_file(model, clip, vae)
    if file is not None:
        return HandedOver(str(file), found.prediction_type)
    copy = folder / f"{NAME}.safetensors"
    write_checkpoint(copy, checkpoint_of(model, clip, vae, _kept_layers(clip)), tick)
    return HandedOver(str(copy), found.prediction_type, (*found.notes, _note(found, copy)))


def _judge_demo(found: Judged, demo: Path) -> None:
    own = read_config(demo / "scheduler" / "scheduler_config.json")["prediction_type"]
    if found.prediction_type != own:
        raise NodeError(
            f"a ModelSampling node makes the demo model's prediction {found.prediction_type!r}, "
            f"which is {own!r}; connect the MODEL from before that node"
        )


def _hand_over_demo(model: Any, clip: Any, vae: Any, demo: Path, folder: Path) -> HandedOver:
    weights = demo_weights(model, clip, vae, demo)
    if weights is None:
        return HandedOver("demo" if demo == DEMO_FOLDER else str(demo), "auto")
    copy = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_demo(demo, weights, copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return HandedOver(str(copy), "auto", (MERGED,))


MERGED = "the base is the model as loaded, LoRAs included"


def _note(found: Judged, copy: Path) -> str:
    return f"{MERGED}; its copy takes {copy.stat().st_size / 1e6:.0f} MB in the job's folder"


# --- the file it came from -----------------------------------------------------------------------


def common_file(model: Any, clip: Any, vae: Any) -> Path | None:
    """The checkpoint that all three were loaded from, where they are still as in there.

    Args:
        model: a MODEL.
        clip: a CLIP.
        vae: a VAE.

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
    """Whether the trainer reads it: a whole checkpoint, and no pickled code in it."""
    try:
        inspect_source(file)
    except UserError:
        return False
    if file.suffix.lower() not in PICKLES:
        return True
    import torch

    try:  # the structure alone: tensors stay on the disk
        torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # whatever is wrong with it, ComfyUI has loaded it in its own way
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

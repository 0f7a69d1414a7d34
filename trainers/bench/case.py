"""A case of the suite: an iteration of a preset on a model with random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config.train_config import TrainConfig, merge, read_preset, validate
from ..estimate.memory import GIB, Estimate, estimate
from ..families.registry import spec_of_source
from ..memory.devices import device_of, memory_of
from ..profile.watch import forget_peak, peak_of
from ..run.method import DTYPES
from ..run.setup import Setup, prepare
from .iteration import one_iteration
from .model import random_model

FULL = 0.8
"""Share of a card's memory that a case may take by its estimate."""
IMAGES = 4
TINY = {"model": {"width": 64, "height": 64}, "sampler": {"steps": 3}, "run": {"micro_batch": 2}}
TINY |= {"prompts": {"images_per_prompt": 2}, "trainable": {"rank": 4}}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        preset: whose model and settings it is.
        side: px of an image.
        update: in one pass or in two.
        base: how the frozen weights are stored, `model.base`.
        compile: whether blocks are compiled.
        is_tiny: a small network of the same kind, few steps.
    """

    preset: str
    side: int
    update: str = "one_pass"
    base: str = "same"
    compile: bool = False
    is_tiny: bool = False

    @property
    def name(self) -> str:
        """Its row of the table."""
        words = [self.preset, f"{self.side} px", self.update.replace("_", " ")]
        words += [self.base] * (self.base != "same") + ["compiled"] * self.compile
        return ", ".join(words)


OWN: Mapping[str, Any] = {
    "sd15-8gb": {"sampler": {"steps": 50}, "trainable": {"rank": 4, "alpha": 4.0}},
}
"""What differs from a preset."""


def config_of(case: Case, device: torch.device, card: float) -> TrainConfig:
    """A case's config: the preset's, with the fastest settings that fit the card.

    Args:
        card: bytes of the device.
    """
    values = merge(
        merge(read_preset(case.preset).model_dump(mode="json"), OWN.get(case.preset, {})),
        {
            "model": {"width": case.side, "height": case.side, "base": case.base},
            "method": {"update": case.update},
            "prompts": {"per_iteration": 1, "images_per_prompt": IMAGES},
            "optimizer": {"updates": 1},
            "run": {"eval_prompts": 0, "device": device.type},
        },
    )
    values["model"]["compile"] = case.compile
    values = merge(values, TINY) if case.is_tiny else _fitted(values, card)
    return validate(values, "the case")


def _fitted(values: dict[str, Any], card: float) -> dict[str, Any]:
    """The settings that save no memory, or else the first that saves enough by its estimate."""
    for again, batch in ((False, 4), (False, 2), (True, 4), (True, 2), (True, 1)):
        changes = {"model": {"gradient_checkpointing": again}, "run": {"micro_batch": batch}}
        values = merge(values, changes)
        if estimate(values, card=card).memory < FULL * card:
            break
    return values


def measure_case(case: Case, device_name: str) -> dict[str, Any]:
    """Measure a case: its second iteration, as kernels are chosen in the first.

    Returns:
        Seconds an image by stage, memory (GiB) and its estimate, work, the largest |log ratio|
        before an update. "error" instead if the case does not fit or cannot be run.
    """
    device = device_of(device_name)
    try:
        return asdict(case) | _measured(case, device)
    except torch.OutOfMemoryError as error:
        return asdict(case) | {"error": f"does not fit: {str(error).split('. ')[0]}"}
    except Exception as error:  # the others are still measured
        return asdict(case) | {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(case: Case, device: torch.device) -> dict[str, Any]:
    card = float(memory_of(device) or 64 * GIB)
    config = config_of(case, device, card)
    expected = None if case.is_tiny else estimate(config.model_dump(mode="json"), card=card)
    spec = spec_of_source(config.model.source)
    assert spec is not None
    waits = expected is not None and 2 * expected.network.weights > card / 2
    dtype = DTYPES[config.model.precision]
    setup = prepare(
        config, loaded=random_model(spec, dtype, device, is_tiny=case.is_tiny, waits=waits)
    )
    forget_peak(device)
    worst = one_iteration(setup, 0)["log_ratio_max_on_policy"]
    with _decoding(setup, device) as decoding:
        line = one_iteration(setup, 1)
    seconds = {
        "rollout": line["seconds_rollout"] - decoding[0],
        "decode": decoding[0],
        "update": line["seconds_update"],
        "iteration": line["seconds"],
    }
    return {
        "micro_batch": config.run.micro_batch,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "seconds_per_image": {k: v / config.images for k, v in seconds.items()},
        "log_ratio_max_on_policy": worst,
        "memory_gib": _memory(device) / GIB,
        **_beside_estimate(expected, line["seconds"] - decoding[0]),
    }


@contextmanager
def _decoding(setup: Setup, device: torch.device) -> Iterator[list[float]]:
    """The seconds that decoding takes within it."""
    family: Any = setup.family
    decode, seconds = family.decode, [0.0]

    def timed(*given: Any, **options: Any) -> Any:
        started = _now(device)
        images = decode(*given, **options)
        seconds[0] += _now(device) - started
        return images

    family.decode = timed
    try:
        yield seconds
    finally:
        del family.decode


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> float:
    """Bytes at the worst moment: on a GPU the allocator's, and what CUDA itself holds."""
    if device.type != "cuda":
        return float(peak_of(device))
    free, total = torch.cuda.mem_get_info(device)
    own = total - free - torch.cuda.memory_reserved(device)
    return float(torch.cuda.max_memory_reserved(device) + own)


def _beside_estimate(expected: Estimate | None, seconds: float) -> dict[str, Any]:
    if expected is None:
        return {}
    work = expected.work["rollout"] + expected.work["update"]
    memory = max(stage.total for stage in expected.stages if stage.name != "encode")
    return {"estimated_gib": memory / GIB, "tflops": work / seconds / 1e12}

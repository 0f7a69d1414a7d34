"""What is counted of a run's phases: passes through the network, and arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..families.embeds import Embeds
from ..run import phases, start
from ..run.phases import LOSS, REFERENCE
from ..run.setup import Setup
from .watch import Watch


@contextmanager
def watch_run(watch: Watch, measure: Any, begin: Callable[[Setup], None]) -> Iterator[None]:
    """Measure a run's phases within it.

    `measure` is entered around each phase, and `begin` is called with the run that begins.
    """
    prepare = start.prepare

    def prepared(*args: Any) -> Setup:
        setup = prepare(*args)
        begin(setup)
        family, accelerator = setup.family, setup.processes.accelerator
        family.predict = _watch_predict(watch, setup, family.predict)
        family.decode = _watch_decode(watch, family.decode)
        accelerator.backward = _watch_backward(watch, accelerator.backward)
        return setup

    start.prepare, phases.measure = prepared, measure
    try:
        yield
    finally:
        start.prepare, phases.measure = prepare, None


def _watch_predict(watch: Watch, setup: Setup, predict: Any) -> Any:
    sampler, negative = setup.config.sampler, setup.sampler.policy.negative

    def branch(embeds: Embeds) -> str:
        if sampler.guidance_scale == 1:
            return ""
        if sampler.guidance_gradient == "both" or len(embeds) > setup.sampler.micro_batch:
            return ", both branches"
        is_negative = embeds.tokens.data_ptr() == negative.tokens.data_ptr()
        return ", unconditional" if is_negative else ", conditional"

    def predicted(latents: Tensor, timestep: Tensor, embeds: Embeds) -> Tensor:
        place = "update" if watch.inside(LOSS) else "rollout"
        place = REFERENCE if watch.inside(REFERENCE) else place
        learns = place == "rollout" and torch.is_grad_enabled()  # in one pass
        kept = " with gradient" if learns else ""
        with watch.phase(f"{place}: forward{kept}{branch(embeds)}") as phase:
            key = (place, len(latents), torch.is_grad_enabled())
            prediction, flop = watch.count_once(key, lambda: predict(latents, timestep, embeds))
            phase.rows += len(latents)
            phase.flop += flop
        return prediction

    return predicted


def _watch_decode(watch: Watch, decode: Any) -> Any:
    def decoded(latents: Tensor) -> Tensor:
        with watch.phase("decode") as phase:
            images, flop = watch.count_once(("decode", len(latents)), lambda: decode(latents))
            phase.flop += flop
        return images

    return decoded


def _watch_backward(watch: Watch, backward: Any) -> Any:
    def back(loss: Tensor, **kwargs: Any) -> None:
        with watch.phase("update: backward") as phase:
            phase.flop += watch.count_once("backward", lambda: backward(loss, **kwargs))[1]

    return back

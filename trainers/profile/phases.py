"""Where the phases of a run begin and end: functions that are wrapped while it is profiled.

A run that is not profiled is not touched. Functions are wrapped where they are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..families.embeds import Embeds
from ..run import checkpoint, held_out, keeper, start
from ..run import rewards as judges
from ..run import sampler as sampling
from ..run import setup as prepare
from ..run.setup import Setup
from ..run.update import learner, one_pass, two_pass
from .watch import Watch

ITERATION, LOSS, REFERENCE = "rest of the iteration", "ratio and objective", "reference"

Between = Callable[[Setup, int], None]

PLACES: tuple[tuple[Any, str, str], ...] = (
    (prepare, "conditioning", "text"),
    (start, "prepare", "loading"),
    (checkpoint, "tensors_of", "checkpoint: state"),
    (checkpoint, "save", "checkpoint: file"),
    (keeper.Keeper, "_export", "report and export"),
    (sampling.Sampler, "given", "noise and transfer"),
    (sampling, "rollout", "step arithmetic"),
    (one_pass, "rollout_with_gradient", "step arithmetic"),
    (sampling.Policy, "__call__", "guidance"),
    (judges.Judges, "score", "reward"),
    (judges.Advantages, "__call__", "advantages"),
    (two_pass.Pairs, "of_steps", "gather and selection"),
    (two_pass.Pairs, "of_images", "gather and selection"),
    (two_pass, "_pairs_of", "gather and selection"),
    (one_pass, "parked", "gather and selection"),
    (two_pass.Objective, "loss", LOSS),
    (one_pass._Work, "_add", "gradients by advantage"),
    (learner.Learner, "step", "optimizer"),
)
"""Where a function is looked up, its name, and its phase."""
WHOLE = (
    (two_pass, "check_on_policy", "on-policy check"),
    (keeper, "evaluate", "evaluation"),
    (held_out, "evaluate", "evaluation"),
)
"""The same for phases that are taken as one, with all that is inside them."""
EVERY = {
    "evaluation": "save_every",
    "report and export": "save_every",
    "checkpoint: state": "checkpoint_every",
    "checkpoint: file": "checkpoint_every",
}
"""Phases outside an iteration, and the field of `run` that says how often they come."""


@contextmanager
def watched(watch: Watch, between: Between) -> Iterator[None]:
    """Measure a run's phases within it.

    `between` is called before and after each iteration with the run and the number of finished
    ones.
    """
    with ExitStack() as stack:
        for is_whole, places in ((False, PLACES), (True, WHOLE)):
            for owner, name, phase in places:
                wrapped = _timed(watch, phase, getattr(owner, name), is_whole=is_whole)
                stack.enter_context(_replaced(owner, name, wrapped))
        for owner, name, change in (
            (prepare, "reference_of", _with_reference),
            (start, "prepare", _with_network),
            (keeper.Keeper, "saved_if_stopped", partial(_with_iteration, between)),
        ):
            stack.enter_context(_replaced(owner, name, change(watch, getattr(owner, name))))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _timed(watch: Watch, phase: str, function: Any, *, is_whole: bool) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with watch.phase(phase, is_whole=is_whole):
            return function(*args, **kwargs)

    return timed


def _with_iteration(between: Between, watch: Watch, saved_if_stopped: Any) -> Any:
    @contextmanager
    def one(kept: keeper.Keeper, at: checkpoint.Position) -> Iterator[None]:
        between(kept.setup, at.iteration)
        with watch.phase(ITERATION), saved_if_stopped(kept, at):
            yield
        between(kept.setup, at.iteration + 1)

    return one


def _with_reference(watch: Watch, reference_of: Any) -> Any:
    def found(*args: Any) -> Any:
        make = reference_of(*args)

        @contextmanager
        def reference() -> Iterator[None]:
            with watch.phase(REFERENCE), make():
                yield

        return None if make is None else reference

    return found


def _with_network(watch: Watch, prepare: Any) -> Any:
    def prepared(*args: Any) -> Setup:
        setup = prepare(*args)
        family, accelerator = setup.family, setup.processes.accelerator
        family.predict = _predicting(watch, setup, family.predict)
        family.decode = _decoding(watch, family.decode)
        accelerator.backward = _backward(watch, accelerator.backward)
        return setup

    return prepared


def _predicting(watch: Watch, setup: Setup, predict: Any) -> Any:
    sampler, negative = setup.config.sampler, setup.sampler.policy.negative

    def branch(embeds: Embeds) -> str:
        if sampler.guidance_scale == 1:
            return ""
        if sampler.guidance_gradient == "both":
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
            prediction, flop = watch.counted(key, lambda: predict(latents, timestep, embeds))
            phase.rows += len(latents)
            phase.flop += flop
        return prediction

    return predicted


def _decoding(watch: Watch, decode: Any) -> Any:
    def decoded(latents: Tensor) -> Tensor:
        with watch.phase("decode") as phase:
            images, flop = watch.counted(("decode", len(latents)), lambda: decode(latents))
            phase.flop += flop
        return images

    return decoded


def _backward(watch: Watch, backward: Any) -> Any:
    def back(loss: Tensor, **kwargs: Any) -> None:
        with watch.phase("update: backward") as phase:
            phase.flop += watch.counted("backward", lambda: backward(loss, **kwargs))[1]

    return back

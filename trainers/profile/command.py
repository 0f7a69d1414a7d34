"""`pcpo profile`: where a run's seconds, passes through the network and memory go."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from ..config import bounds
from ..config.arguments import POSITIONAL, parse
from ..config.bounds import Iterations
from ..config.run_arguments import ConfigArguments
from ..config.train_config import TrainConfig, current_name, presets, validate
from ..job.files import write_json
from ..memory.devices import device_label, is_on_cpu
from ..reading import check_target
from ..run.method import DTYPES
from ..run.phases import ITERATION
from ..run.setup import Setup
from ..run.start import train
from .phases import watch_run
from .watch import Phase, Watch, product_rate

Clock = Callable[[], float]
EVERY = {
    "evaluation": "save_every",
    "report and export": "save_every",
    "checkpoint: state": "checkpoint_every",
    "checkpoint: file": "checkpoint_every",
}
"""Phases outside an iteration, and the field of `run` that says how often they come."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The costs of an iteration; numbers are means over the measured iterations.

    Attributes:
        phases: of an iteration, with the share of evaluation, checkpoint and export in it: the cost
            of one, divided by the iterations from one to the next.
        once: phases that a run has once, to begin.
        passes: latents through the network, per image.
        minimum: the same as the method needs it, without padding or repetition.
        rate: operations per second of a large matrix product, on the same device in the same dtype.
    """

    device: str
    dtype: str
    threads: int
    images: int
    iterations: int
    phases: dict[str, Phase]
    once: dict[str, Phase]
    passes: float
    minimum: float
    rate: float

    @property
    def seconds(self) -> float:
        """Seconds of an iteration with its share of what is outside it."""
        return sum(phase.seconds for phase in self.phases.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds}


class ProfileArguments(ConfigArguments):
    """Show where the seconds, passes and memory of a preset's iterations go."""

    config: Annotated[str | None, POSITIONAL] = Field(
        default=None, description="a preset or a config file"
    )
    iterations: Iterations = Field(
        default=3, lt=bounds.ITERATIONS, description="iterations to measure, after one to warm up"
    )
    json_file: Annotated[str | None, "--json"] = Field(
        default=None, description="also write all numbers to this file"
    )

    @classmethod
    def base_config(cls, given: Mapping[str, Any]) -> tuple[TrainConfig, str] | None:
        if current_name(given.get("config")) in presets():
            given = {"preset": given["config"]}
        return super().base_config(given)


def main(arguments: list[str]) -> int:
    """Profile a preset or a config file, print the table, and write it if asked to."""
    a = parse(ProfileArguments, arguments, "pcpo profile")
    if a.json_file is not None:
        check_target(a.json_file, "--json", is_folder=False)
    config, name = a.read()
    measured = profile(config, a.iterations)
    print(table(measured, name))
    if a.json_file is not None:
        write_json(Path(a.json_file), {"name": name, **measured.as_json()})
    return 0


def profile(config: TrainConfig, iterations: int = 3, clock: Clock = time.perf_counter) -> Profile:
    """Run a config for a while, in a folder that is removed again.

    Args:
        iterations: to measure; one more precedes them.
        clock: seconds, from any start; `time.process_time` for a CPU that others use too.
    """
    run = {"iterations": iterations + 1, "save_every": iterations + 1, "checkpoint_every": 1}
    run |= {"publish": None, "tensorboard": False, "cache": "off"}
    values = config.model_dump(mode="json")
    short = validate(values | {"run": values["run"] | run}, "the config")
    device = torch.device("cpu" if is_on_cpu(config.run.device) else "cuda")
    watch = Watch(device, clock)
    seen = _Recorder(watch)
    with tempfile.TemporaryDirectory(prefix="pcpo-profile-") as folder:
        with watch_run(watch, seen.measure, seen.begin):
            train(short, Path(folder) / "run")
        seen.add_outside()
    return seen.profile(config, product_rate(device, DTYPES[config.model.precision], clock))


@dataclass(slots=True)
class _Recorder:
    """Sorts measurements: the first iteration, the others, and what is outside of iterations."""

    watch: Watch
    setup: Setup | None = None
    first: dict[str, Phase] = field(default_factory=dict)
    iterations: list[dict[str, Phase]] = field(default_factory=list)
    outside: dict[str, Phase] = field(default_factory=dict)

    def begin(self, setup: Setup) -> None:
        self.setup = setup

    @contextmanager
    def measure(self, name: str, is_whole: bool) -> Iterator[None]:
        """Measure what is done within it as a phase, and an iteration by itself."""
        if name == ITERATION:
            self.add_outside()
        with self.watch.phase(name, is_whole=is_whole):
            yield
        if name == ITERATION and self.first:
            self.iterations.append(self.watch.take())
        elif name == ITERATION:
            self.first = self.watch.take()

    def add_outside(self) -> None:
        """Keep what was measured outside of iterations."""
        self.outside = _sum_phases([self.outside, self.watch.take()])

    def profile(self, config: TrainConfig, rate: float) -> Profile:
        """Means over the iterations, and each other phase's share."""
        assert self.setup is not None
        count = len(self.iterations)
        phases = {k: _times(v, 1 / count) for k, v in _sum_phases(self.iterations).items()}
        rows = sum(phase.rows for phase in phases.values())
        for name, every in EVERY.items():
            one = _times(self.outside[name], 1 / self.outside[name].calls)
            phases[name] = _times(one, 1 / getattr(config.run, every))
        loading = {k: v for k, v in self.outside.items() if k not in EVERY}
        checks = {k: v for k, v in self.first.items() if k not in phases}
        return Profile(
            device=device_label(self.watch.device),
            dtype=config.model.precision,
            threads=torch.get_num_threads(),
            images=config.images,
            iterations=count,
            phases=phases,
            once=loading | checks,
            passes=rows / config.images,
            minimum=_minimum(self.setup, count),
            rate=rate,
        )


def _sum_phases(parts: list[dict[str, Phase]]) -> dict[str, Phase]:
    total: dict[str, Phase] = {}
    for part in parts:
        for name, phase in part.items():
            into = total.setdefault(name, Phase())
            into.seconds += phase.seconds
            into.calls += phase.calls
            into.rows += phase.rows
            into.flop += phase.flop
            into.peak = max(into.peak, phase.peak)
    return total


def _times(phase: Phase, factor: float) -> Phase:
    return Phase(
        seconds=phase.seconds * factor,
        calls=phase.calls * factor,
        rows=phase.rows * factor,
        flop=phase.flop * factor,
        peak=phase.peak,
    )


def _minimum(setup: Setup, iteration: int) -> float:
    """Passes per image: its steps, in two passes the trained ones again, and the reference's."""
    config, plan = setup.config, setup.plans.at(iteration)
    kept = int(plan.trained.sum())
    trained = len(setup.learner.selection(kept, torch.Generator()))
    is_one = config.method.update == "one_pass"
    frozen = 0 if setup.sampler.reference is None else trained if is_one else kept
    if frozen and plan.compared is not None:
        frozen = int(plan.compared.sum())
    branches = 1 if config.sampler.guidance_scale == 1 else 2
    return branches * (len(plan) + (0 if is_one else trained) + frozen)


# --- in words --------------------------------------------------------------------------------


def table(profiled: Profile, name: str) -> str:
    """A profile as lines for a terminal; `name` is the preset's or config's."""
    where = (
        f"{profiled.device} ({profiled.threads} threads)"
        if profiled.device == "CPU"
        else profiled.device
    )
    lines = [
        f"{name} on {where}, {profiled.dtype}: {profiled.images} images an iteration, mean of "
        f"{profiled.iterations} after one to warm up",
        f"{'phase':36}{'seconds':>10}{'share':>8}{'passes':>9}{'GFLOP/s':>10}{'of peak':>9}"
        f"{'MiB':>8}",
    ]
    order = sorted(profiled.phases.items(), key=lambda item: -item[1].seconds)
    lines += [_row(key, phase, profiled) for key, phase in order]
    lines.append(f"{'an iteration':36}{profiled.seconds:10.3f}{1:8.1%}")
    once = ", ".join(f"{key} {phase.seconds:.2f} s" for key, phase in profiled.once.items())
    return "\n".join(
        [
            *lines,
            f"once: {once}",
            f"passes through the network an image: {profiled.passes:g}; the method needs "
            f"{profiled.minimum:g}",
            f"peak: {profiled.rate / 1e9:.0f} GFLOP/s, a large matrix product in {profiled.dtype}; "
            "MiB: " + ("of tensors" if profiled.device != "CPU" else "of the whole process"),
        ]
    )


def _row(name: str, phase: Phase, profiled: Profile) -> str:
    speed = ""
    if phase.flop:
        rate = phase.flop / phase.seconds
        speed = f"{rate / 1e9:10.1f}{rate / profiled.rate:9.0%}"
    passes = f"{phase.rows:9.0f}" if phase.rows else " " * 9
    return (
        f"{name:36}{phase.seconds:10.3f}{phase.seconds / profiled.seconds:8.1%}{passes}{speed:19}"
        f"{phase.peak / 2**20:8.0f}"
    )

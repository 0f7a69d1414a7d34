"""Compute to a reward: how much each way of training needs to rise as far as the baseline does.

    python tests/benchmarks/to_reward.py --model tiny-flow --seeds 5 --out flow.json --plot flow.png

The first way is the peers' loop, rebuilt from how they order batches and passes (Flow-GRPO's on
tiny-flow, DDPO's on tiny-sd). For each seed the ways take turns, one iteration at a time, until
each has used the processor time of the first; evaluations are not counted. A target is a share of
the rise that the first way makes at a seed. Each seed is written when it is done, and a second call
goes on with those that are missing. OMP_NUM_THREADS=1 makes processor time comparable.

Where a way reaches the reward of a target, it is also told how much the images of a prompt differ
and how far the held-out images are from the base's, at the same seeds (RMS of pixels, 0 to 1).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfyui_pcpo.pcpo.metrics.similarity import pixel_diversity, rms
from comfyui_pcpo.pcpo.plan import Plan
from comfyui_pcpo.pcpo.ratios import gaussian_log_prob
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.config.train_config import TrainConfig, merge, read_preset, validate
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.run.held_out import evaluate, sample_and_score
from comfyui_pcpo.trainers.run.iteration import order_of, requests_of
from comfyui_pcpo.trainers.run.sampler import Request, noise_of
from comfyui_pcpo.trainers.run.setup import Setup, prepare
from comfyui_pcpo.trainers.run.update.learner import sums_on_policy

PRESETS = {"tiny-flow": "demo-flow", "tiny-sd": "demo"}
BASE: dict[str, dict[str, Any]] = {
    "tiny-flow": {
        "prompts": {"per_iteration": 4, "images_per_prompt": 16},
        "run": {"micro_batch": 16, "eval_steps": 6},
    },
    "tiny-sd": {
        "prompts": {"per_iteration": 4, "images_per_prompt": 16},
        "sampler": {"steps": 20},
        "trainable": {"rank": 4, "alpha": 4.0, "targets": ["to_q", "to_k", "to_v", "to_out.0"]},
        "optimizer": {"lr": 4e-3},
        "run": {"micro_batch": 16, "eval_steps": 6},
    },
}
PEER = {"credit": "native", "ratio": "density", "objective": "ppo_clip", "update": "two_pass"}
WINDOW = {"selection": "sliding_window", "window_move": "sliding", "window_every": 1}
WAYS = ("peer", "baseline", "two-pass", "one-pass", "window", "branches", "all", "control")
LENGTH, SPLIT = {"tiny-flow": 3, "tiny-sd": 6}, {"tiny-flow": 3, "tiny-sd": 8}
"""Steps of a window; the step at which images part where all steps carry noise."""
FIRST = {"tiny-flow": 5, "tiny-sd": 17}
"""All steps but the last three, whose weights are the largest on tiny-sd."""
RUN = {"device": "cpu", "iterations": 1000}  # as many as the time is enough for
SHARES = (0.25, 0.5, 0.75, 1.0)
SEEN = ("seconds", "images", "diversity", "drift")
ALIKE = 8
"""Held-out prompts, and images of each, whose differences are measured."""


def changes_of(model: str, way: str) -> dict[str, Any]:
    """What a way changes: the peers' method, or a part of ours, or all parts."""
    window = WINDOW | {"window": LENGTH[model]}
    first = WINDOW | {"window_move": "fixed", "window": FIRST[model]}
    one_pass = {"update": "one_pass"}
    return {
        "peer": {"method": PEER},
        "baseline": {"method": PEER},
        "one-pass": {"method": one_pass},
        "window": {"method": window},
        "branches": {"sampler": {"branches": 4, "branch_at": (SPLIT[model],)}},
        "control": {"method": PEER | first},
        "all": {"method": first | one_pass}
        if model == "tiny-sd"  # where images that share a path learn less
        else {"method": window | one_pass, "sampler": {"branches": 16}},
    }.get(way, {})


def config_of(model: str, way: str, seed: int, changes: list[str]) -> TrainConfig:
    """The preset, every step trained and in two passes but for what a way changes."""
    values = read_preset(PRESETS[model]).model_dump(mode="json")
    values = merge(values, {"method": {"update": "two_pass", "selection": "all"}})
    values = merge(merge(values, BASE[model]), {"run": {"seed": seed, **RUN}})
    for change in changes:
        name, _, value = change.partition("=")
        section, field = name.split(".")
        values[section][field] = json.loads(value)
    return validate(merge(values, changes_of(model, way)), "the benchmark")


# --- the peers' loop ------------------------------------------------------------------------------


def guided(setup: Setup, x: torch.Tensor, plan: Plan, i: int, embeds: Any) -> torch.Tensor:
    """Both branches of guidance in one batch, as the peers run them, with a graph or without."""
    return setup.sampler.policy.joined(x, plan.timesteps[i].expand(len(x)), embeds)


def step_mean(plan: Plan, i: int, x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    return plan.mean_x[i] * x + plan.mean_p[i] * prediction


def peer_iteration(setup: Setup, number: int) -> None:
    """Sample in batches and keep every latent; then, in shuffled batches, train step after step.

    The KL's reference runs in the update, with the adapters off. Images whose advantage is 0 are
    left out, as Flow-GRPO leaves them out.
    """
    config, sampler = setup.config, setup.sampler
    requests, size = requests_of(config, len(setup.prompts), number), config.run.micro_batch
    plan = setup.plans.at(number).to(setup.processes.device)
    latents, logs, images = [], [], []
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        noise, embeds = noise_of(batch, len(plan), sampler.shape), sampler.conditions(batch)
        kept, own = [noise[:, 0]], []
        with torch.no_grad():
            for i in range(len(plan)):
                mean = step_mean(plan, i, kept[-1], guided(setup, kept[-1], plan, i, embeds))
                kept.append(mean + plan.std[i] * noise[:, i + 1])
                own.append(gaussian_log_prob(kept[-1], mean, plan.std[i].expand(len(mean))))
        images.append(sampler.images(kept[-1], kept[-1]))
        latents.append(torch.stack(kept, 1))
        logs.append(torch.stack(own, 1))
    texts = [setup.prompts[request.prompt] for request in requests]
    rewards = setup.reward_set.score(torch.cat(images), texts).T
    seen = Seen(torch.cat(latents), torch.cat(logs), setup.advantages(rewards, texts))
    updates = config.optimizer.updates
    for turn, part in enumerate(torch.tensor(order_of(config, number)).tensor_split(updates)):
        for rows in part[seen.advantages[part] != 0].split(size):
            _train(setup, plan, requests, seen, rows, len(part))
        one = torch.ones((), device=plan.std.device)
        setup.learner.step(number * updates + turn, sums_on_policy(one, 0 * one, 0 * one))


@dataclass(frozen=True, slots=True)
class Seen:
    """All images of an iteration: the latents of every step, log densities, advantages."""

    latents: torch.Tensor
    logs: torch.Tensor
    advantages: torch.Tensor


def _train(
    setup: Setup, plan: Plan, requests: list[Any], seen: Seen, rows: torch.Tensor, images: int
) -> None:
    """Add the gradients of a batch of an update, of so many images."""
    method, trained = setup.config.method, plan.trained.nonzero().flatten().tolist()
    embeds = setup.sampler.conditions([requests[row] for row in rows.tolist()])
    advantages = seen.advantages[rows]
    for i in trained if len(rows) else ():
        x, after = seen.latents[rows, i], seen.latents[rows, i + 1]
        std = plan.std[i].expand(len(x))
        mean = step_mean(plan, i, x, guided(setup, x, plan, i, embeds))
        ratio = (gaussian_log_prob(after, mean, std) - seen.logs[rows, i]).exp()
        clipped = ratio.clamp(1 - method.clip_low, 1 + method.clip_high)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        if method.kl_weight:
            with torch.no_grad(), (setup.sampler.reference or nullcontext)():
                frozen = guided(setup, x, plan, i, embeds)
            apart = (mean - step_mean(plan, i, x, frozen)).square().flatten(1).mean(1)
            loss = loss + method.kl_weight * apart / (2 * std**2)
        (loss.sum() / (len(trained) * images)).backward()


# --- measuring ------------------------------------------------------------------------------------


class Way:
    """One way of training: what it has used so far, and its rewards along the way."""

    def __init__(self, model: str, name: str, seed: int, changes: list[str]) -> None:
        self.name, self.setup = name, prepare(config_of(model, name, seed, changes))
        self.seconds, self.rows = 0.0, {"forward": 0, "with gradient": 0}
        self.base = evaluate(self.setup).images
        self.curve = [self._point(0)]

    def _point(self, images: int) -> dict[str, Any]:
        now, first = evaluate(self.setup), len(self.setup.prompts)
        pairs = [(i, j) for i in range(min(ALIKE, len(self.setup.held_out))) for j in range(ALIKE)]
        asked = [Request(first + i, ("alike", i, j)) for i, j in pairs]
        groups = sample_and_score(self.setup, asked, [])[0].split(ALIKE)
        return {
            "images": images,
            "seconds": self.seconds,
            "reward": now.mean,
            "diversity": statistics.mean(map(pixel_diversity, groups)),
            "drift": rms(now.images, self.base).mean().item(),
        }

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the rows that the network sees within it."""
        family: Any = type(self.setup.family)
        predict = family.predict

        def counting(own: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.rows["with gradient" if torch.is_grad_enabled() else "forward"] += len(x)
            return predict(own, x, *rest)

        family.predict = counting
        try:
            yield
        finally:
            family.predict = predict

    def go_on(self) -> None:
        """One iteration more."""
        number = len(self.curve) - 1
        started = time.process_time()
        with self.counted():
            if self.name in ("peer", "control"):
                peer_iteration(self.setup, number)
            else:
                one_iteration(self.setup, number)
        self.seconds += time.process_time() - started
        self.curve.append(self._point((number + 1) * self.setup.config.images))

    def result(self) -> dict[str, Any]:
        images = max(1, self.curve[-1]["images"])
        return {
            "curve": self.curve,
            "rows_per_image": {name: count / images for name, count in self.rows.items()},
        }


def one_seed(
    model: str, names: list[str], seed: int, iterations: int, changes: list[str]
) -> dict[str, Any]:
    """All ways of a seed, in turns; each may use the time that the first one does."""
    ways = [Way(model, name, seed, changes) for name in names]
    first, *others = ways
    for number in range(iterations):
        first.go_on()
        for way in others:
            while way.seconds < first.seconds:
                way.go_on()
        state = "  ".join(f"{w.name} {w.curve[-1]['reward']:.3f}" for w in ways)
        print(f"seed {seed}, turn {number + 1}: {state}", flush=True)
    return {way.name: way.result() for way in ways}


def smoothed(curve: list[dict[str, Any]]) -> list[float]:
    """Means of three evaluations: a held-out reward is noisy."""
    rewards = [point["reward"] for point in curve]
    return [statistics.mean(rewards[max(0, i - 1) : i + 2]) for i in range(len(rewards))]


def reached(curve: list[dict[str, Any]], target: float, what: str) -> float | None:
    """How many seconds or images a curve needs to a reward, between two evaluations by a line."""
    for (before, a), (after, b) in pairwise(zip(smoothed(curve), curve, strict=True)):
        if after >= target:
            share = 0.0 if after == before else max(0.0, (target - before) / (after - before))
            return a[what] + share * (b[what] - a[what])
    return None


def target_of(curve: list[dict[str, Any]], share: float) -> float:
    """The reward at a share of a curve's rise."""
    start = curve[0]["reward"]
    return start + share * (smoothed(curve)[-1] - start)


def lines_of(runs: list[Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    """Times, and each way's rewards then: (runs, times)."""
    first = [run[names[0]]["curve"] for run in runs]
    at = np.linspace(0, min(curve[-1]["seconds"] for curve in first), 400)

    def line(curve: list[dict[str, Any]]) -> Any:
        return np.interp(at, [point["seconds"] for point in curve], smoothed(curve))

    return at, {name: np.stack([line(run[name]["curve"]) for run in runs]) for name in names}


def ratios_of_means(at: Any, first: Any, other: Any, share: float) -> Any:
    """How long mean curves need to a share of the first one's rise, as parts of its own times.

    Args:
        at: times.
        first: (draws, times).
        other: likewise.
        share: of the rise.
    """
    target = first[:, :1] + share * (first[:, -1:] - first[:, :1])
    own, its = (
        np.where((c >= target).any(1), at[(c >= target).argmax(1)], math.inf)
        for c in (other, first)
    )
    return own / np.maximum(its, at[1])


def table(seeds: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What each way needs to the first one's rewards, and how its images are there.

    "ratio" is the median over the seeds of its time as a part of the first one's, each seed with
    its own target; "mean" is that of the mean curves, with a 95% interval by drawing seeds anew.
    What is never reached takes for ever.
    """
    runs, first = list(seeds.values()), names[0]
    at, lines = lines_of(runs, names)
    chosen = np.random.default_rng(0).integers(0, len(runs), (2000, len(runs)))
    draws = np.concatenate([np.arange(len(runs))[None], chosen])  # the runs themselves first
    first_point, found = runs[0][first]["curve"][0], dict[str, Any](ways={})
    for name in names:
        rows = [run[name]["rows_per_image"] for run in runs]
        row: dict[str, Any] = {k: statistics.mean(r[k] for r in rows) for k in rows[0]}
        row["final"] = statistics.mean(smoothed(run[name]["curve"])[-1] for run in runs)
        for share in SHARES:
            targets = [(run[name]["curve"], target_of(run[first]["curve"], share)) for run in runs]
            needs = {
                what: [reached(*pair, what) for pair in targets]
                for what in SEEN
                if what in first_point
            }
            its = [
                reached(run[first]["curve"], target, "seconds")
                for run, (_, target) in zip(runs, targets, strict=True)
            ]
            ratios = [
                math.inf if a is None else a / b
                for a, b in zip(needs["seconds"], its, strict=True)
                if b
            ]
            means = ratios_of_means(at, *(lines[n][draws].mean(1) for n in (first, name)), share)
            row[f"{share:.0%}"] = {
                **{what: _median(values) for what, values in needs.items()},
                "ratios": ratios,
                "ratio": statistics.median(ratios) if ratios else math.inf,
                "mean": means[0].item(),
                "mean_interval": np.quantile(means, (0.025, 0.975), method="nearest").tolist(),
            }
        found["ways"][name] = row
    return found


def _median(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def plot(seeds: dict[str, Any], names: list[str], file: Path) -> None:
    """Reward over processor time, a line for each seed and a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        curves = [seeds[s][name]["curve"] for s in seeds]
        at = np.linspace(0, min(c[-1]["seconds"] for c in curves), 60)
        lines = [np.interp(at, [p["seconds"] for p in c], smoothed(c)) for c in curves]
        axes.plot(at, np.mean(lines, axis=0), color=f"C{number}", label=name)
        for line in lines:
            axes.plot(at, line, color=f"C{number}", alpha=0.2, linewidth=0.7)
    axes.set(xlabel="CPU seconds, one thread", ylabel="held-out reward")
    axes.legend()
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the table.

    Raises:
        SystemExit: if the file is of other settings.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="tiny-flow")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS[:-1]))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=16, help="of the first way")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=JSON")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args(arguments)
    asked = {"model": a.model, "ways": a.ways, "iterations": a.iterations, "set": a.set}
    known = json.loads(a.out.read_text("utf-8")) if a.out.exists() else {"asked": asked}
    if known["asked"] != asked:
        raise SystemExit(f"{a.out} is of {known['asked']}; name another file")
    seeds = known.setdefault("seeds", {})
    for seed in range(a.seeds):
        if str(seed) not in seeds:
            seeds[str(seed)] = one_seed(a.model, a.ways, seed, a.iterations, a.set)
            write_json(a.out, known | {"table": table(seeds, a.ways)})
    found = table(seeds, a.ways)
    for name, row in found["ways"].items():
        cells = [f"{row[f'{s:.0%}']['ratio']:6.2f} ({row[f'{s:.0%}']['mean']:.2f})" for s in SHARES]
        print(f"{name:10} {row['final']:.3f} " + " ".join(cells))
    if a.plot:
        plot(seeds, a.ways, a.plot)


if __name__ == "__main__":
    main()

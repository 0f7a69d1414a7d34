"""The training loop, from top to bottom.

for each iteration:
    sample images with the present policy        (sampling.py, pcpo.rollout)
    score them                                   (pcpo.rewards)
    compare them with each other                 (pcpo.advantages)
    move the policy towards the better ones      (update.py, pcpo.objectives)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..pcpo import combine_advantages
from ..pcpo.rollout import generator_for
from . import lora, report
from .config import ConfigError, TrainConfig
from .errors import UserError
from .images import Images, before_after, save_images
from .job import JobFolder, write_json
from .prepare import Setup, evaluation_sampler, prepare, swapped
from .progress import Progress
from .prompts import chosen_prompts
from .sampling import Request, Sampled
from .update import Batch, Pairs, accumulate, check_on_policy, chosen_pairs, summarise
from .versions import versions


class RewardError(UserError, RuntimeError):
    """A reward failed; nothing was learnt from the iteration."""


Evaluated = tuple[Images, list[float]]  # images of the held-out prompts, and their rewards


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to.

    Attributes:
        before: mean reward on the held-out prompts, before training.
        after: the same after it.
        export: the last exported file.
        folder: where everything is.
    """

    before: float
    after: float
    export: Path
    folder: Path


def train(config: TrainConfig, root: Path, progress: Progress | None = None) -> Result:
    """Run a config to its end.

    Args:
        config: the run.
        root: where it writes; must not hold a run already.
        progress: shown what happens; silent where None.

    Returns:
        The rewards before and after, and the exported file.

    Raises:
        ConfigError: where the folder holds a run, or the config cannot be run (see `prepare`).
    """
    progress = progress or Progress.silent()
    folder = JobFolder(root)
    if folder.is_used():
        raise ConfigError(f"{root} holds a run already; choose another folder with --out")
    setup = prepare(config, progress.say)
    for note in setup.notes:
        progress.say(note)
    folder.start(config.model_dump(mode="json"), versions())
    try:
        return _train(setup, folder, progress)
    except BaseException as error:
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        folder.status(state, message=f"{type(error).__name__}: {error}")
        raise


def _train(setup: Setup, folder: JobFolder, progress: Progress) -> Result:
    config, count = setup.config, setup.config.run.iterations
    folder.status("running", iteration=0, of=count)
    first = evaluate(setup)
    before = after = _mean(first[1])
    progress.say(f"held-out reward before training: {before:.3f}")
    export = folder.lora
    for iteration in range(count):
        started = time.monotonic()
        plan = setup.plans.at(iteration, setup.selection).to(setup.accelerator.device)

        requests = requests_of(setup, iteration)
        mine = _share(requests, setup)
        bar = progress.bar("sampling", len(mine))
        sampled = setup.sampler.under(plan)([requests[i] for i in mine], bar)
        rewards = score(setup, sampled, [setup.prompts[requests[i].prompt] for i in mine])
        advantages = advantages_of(setup, rewards, requests)
        rolled_out = time.monotonic()

        device = setup.accelerator.device
        embeds = setup.embeds[[requests[i].prompt for i in mine]].to(device)
        batch = Batch(sampled.trajectory, embeds, advantages[mine].to(device), plan)
        if iteration == 0:
            worst = check_on_policy(setup.objective, batch, config.run.micro_batch)
            progress.say(f"on policy |log ratio| is {worst:.1e}")
        updates = update(setup, batch, requests, mine, iteration, progress)

        line = _line(iteration, rewards, config, updates, started, rolled_out)
        if (iteration + 1) % config.run.save_every == 0 or iteration + 1 == count:
            now = evaluate(setup)
            line["held_out"] = after = _mean(now[1])
            export = keep(setup, folder, iteration + 1, first, now)
        if setup.accelerator.is_main_process:
            folder.add_metrics(line)
        eta = progress.iteration(line, count)
        folder.status("running", iteration=iteration + 1, of=count, eta_seconds=eta)
    if setup.accelerator.is_main_process:
        method, rate = config.method, config.optimizer.lr
        title = f"{method.credit} credit, {method.objective}, lr {rate:g}"
        report.plot_run(folder.metrics(), folder.report / "curves.png", title)
    folder.status("done", iteration=count, of=count, message=f"{before:.3f} -> {after:.3f}")
    return Result(before, after, export, folder.root)


def requests_of(setup: Setup, iteration: int) -> list[Request]:
    """The images of an iteration, over all processes: a function of its number alone."""
    config = setup.config
    seed, shared = config.run.seed, config.sampler.initial_noise
    chosen = chosen_prompts(config.prompts, len(setup.prompts), seed, iteration)
    requests = []
    for slot, prompt in enumerate(chosen):
        initial = {"image": None, "prompt": (seed, iteration, slot), "batch": (seed, iteration)}
        for image in range(config.prompts.images_per_prompt):
            key = (seed, iteration, slot, image)
            requests.append(Request(prompt, key, initial[shared]))
    return requests


def _share(requests: Sequence[Request], setup: Setup) -> list[int]:
    """This process's images."""
    world, rank = setup.accelerator.num_processes, setup.accelerator.process_index
    return list(range(len(requests)))[
        rank * len(requests) // world : (rank + 1) * len(requests) // world
    ]


def score(setup: Setup, sampled: Sampled, prompts: list[str]) -> Tensor:
    """Rewards of all processes' images, (rewards, b), in the order of the requests.

    Raises:
        RewardError: where one of them is missing or not a number.
    """
    found = []
    for reward in setup.rewards:
        scores = reward.score(sampled.images, prompts)
        if not scores.values.isfinite().all():
            why = next((error for error in scores.errors if error), "it is not a number")
            raise RewardError(f"the reward {reward.name!r} failed: {why}")
        found.append(scores.values.float())
    columns = torch.stack(found, dim=1).tolist()
    return torch.tensor(gather_object(columns)).T


def advantages_of(setup: Setup, rewards: Tensor, requests: Sequence[Request]) -> Tensor:
    """How much better than expected each image is, (b,)."""
    prompts = [setup.prompts[request.prompt] for request in requests]
    weights = list(setup.config.rewards.values())
    if setup.config.advantage.combine == "advantages":
        return combine_advantages(setup.advantages, list(rewards), weights, prompts)
    total = (torch.tensor(weights)[:, None] * rewards).sum(dim=0)
    return setup.advantages[0](total, prompts)


def update(
    setup: Setup,
    batch: Batch,
    requests: Sequence[Request],
    mine: Sequence[int],
    iteration: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """The iteration's optimizer steps, each on its own part of the images.

    Args:
        setup: the run.
        batch: this process's trajectories.
        requests: the images of all processes.
        mine: which of them this process has.
        iteration: counted from 0.
        progress: shown what happens.

    Returns:
        The means of each update.
    """
    config, accelerator = setup.config, setup.accelerator
    generator = generator_for(config.run.seed, "order", iteration)
    order = torch.randperm(len(requests), generator=generator)
    steps, size, summaries = len(batch.trajectory.step), config.run.micro_batch, []
    row_of = {image: row for row, image in enumerate(mine)}
    for part in order.tensor_split(config.optimizer.updates):
        owned = [(row_of[i], requests[i].key) for i in part.tolist() if i in row_of]
        chosen = chosen_pairs(owned, steps, setup.selection)
        images = [(0, requests[i].key) for i in part.tolist()]
        total = len(chosen_pairs(images, steps, setup.selection))
        sums = torch.zeros(8, device=accelerator.device)
        if chosen:
            pairs = Pairs.of(chosen, size, accelerator.device)
            bar = progress.backward(accelerator.backward, len(pairs.image) // size)
            sums = accumulate(setup.objective, batch, pairs, total, size, bar)
        norm = _step(setup)
        summaries.append(summarise(_reduced(setup, sums)) | {"grad_norm": norm})
    return summaries


def _step(setup: Setup) -> float:
    """One optimizer step on the gradients of all processes; their norm before clipping."""
    for parameter in setup.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = setup.accelerator.reduce(parameter.grad, "sum")  # pyright: ignore
    limit = setup.config.optimizer.max_grad_norm
    norm: Any = setup.accelerator.clip_grad_norm_(setup.parameters, limit)
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    if setup.averaged is not None:
        decay = setup.config.trainable.ema_decay
        now = [parameter.detach() for parameter in setup.parameters]
        torch._foreach_lerp_(setup.averaged, now, 1 - decay)
    return float(norm)


def _reduced(setup: Setup, sums: Tensor) -> list[float]:
    """Sums over all processes; the first entry is a maximum."""
    if setup.accelerator.num_processes == 1:
        return sums.tolist()
    everyone: Any = setup.accelerator.gather(sums[None])
    return [everyone[:, 0].max().item(), *everyone[:, 1:].sum(0).tolist()]


def _line(
    iteration: int,
    rewards: Tensor,
    config: TrainConfig,
    updates: list[dict[str, float]],
    started: float,
    rolled_out: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    total = (torch.tensor(list(config.rewards.values()))[:, None] * rewards).sum(dim=0)
    now = time.monotonic()
    mean = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
    parts = {f"reward_{n}": r.mean().item() for n, r in zip(config.rewards, rewards, strict=True)}
    return {
        "iteration": iteration + 1,
        "reward": total.mean().item(),
        "reward_std": total.std(correction=0).item(),
        "reward_min": total.min().item(),
        "reward_max": total.max().item(),
        **parts,
        **mean,
        "log_ratio_max": max(u["log_ratio_max"] for u in updates),
        "clip_fraction_on_policy": updates[0]["clip_fraction"],
        "outside_fraction_on_policy": updates[0]["outside_fraction"],
        "log_ratio_max_on_policy": updates[0]["log_ratio_max"],
        "seconds": now - started,
        "seconds_rollout": rolled_out - started,
        "seconds_update": now - rolled_out,
        "images_per_second": config.images / (now - started),
    }


def evaluate(setup: Setup) -> Evaluated:
    """Images and rewards on the held-out prompts at fixed seeds, sampled without noise."""
    offset = len(setup.prompts)
    requests = [Request(offset + i, ("evaluation", i)) for i in range(len(setup.held_out))]
    if not requests:
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8), []
    averaged = nullcontext()
    if setup.averaged is not None:
        averaged = swapped(setup.parameters, setup.averaged)
    with averaged:
        images = evaluation_sampler(setup)(requests).images
    weighted = [
        weight * reward.score(images, list(setup.held_out)).values
        for reward, weight in zip(setup.rewards, setup.config.rewards.values(), strict=True)
    ]
    return images, torch.stack(weighted).sum(0).tolist()


def keep(setup: Setup, folder: JobFolder, iteration: int, first: Evaluated, now: Evaluated) -> Path:
    """Write the samples, the comparison and the LoRA (or the network) of an iteration."""
    name = f"pcpo_{iteration:05}.safetensors"
    if not setup.accelerator.is_main_process:
        return folder.lora / name
    images, scores = now
    save_images(images, folder.samples / f"{iteration:05}")
    prompts = list(setup.held_out)
    if prompts:
        pairs = list(zip(first[1], scores, strict=True))
        before_after(first[0], images, prompts, pairs, folder.report / "before_after.png")
    write_json(
        folder.samples / f"{iteration:05}" / "scores.json",
        [{"prompt": p, "reward": s} for p, s in zip(prompts, scores, strict=True)],
    )
    metadata = {
        "pcpo_iteration": iteration,
        "pcpo_method": f"{setup.config.method.credit}/{setup.config.method.objective}",
        "pcpo_rewards": ", ".join(setup.config.rewards),
        "ss_base_model_version": getattr(setup.family, "base_model_version", "sd_v1"),
    }
    context = nullcontext()
    if setup.averaged is not None:
        context = swapped(setup.parameters, setup.averaged)
    with context:
        if setup.config.trainable.kind == "lora":
            return lora.export_sd1(setup.family.network, folder.lora / name, metadata=metadata)
        return lora.export_unet(setup.family.network, folder.lora / name, metadata=metadata)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")

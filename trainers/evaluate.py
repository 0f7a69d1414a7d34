"""The held-out comparison: images at fixed seeds, their rewards, and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from . import lora, report
from .checkpoint import Position
from .files import write_json
from .images import Images, before_after, load_images, save_images
from .job import JobFolder
from .prepare import Setup, evaluation_sampler, swapped
from .progress import Progress
from .report_page import write_page
from .sampling import Request


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out prompts' images at fixed seeds, and their rewards."""

    images: Images
    scores: list[float]

    @property
    def mean(self) -> float:
        """Mean reward; NaN without held-out prompts."""
        return sum(self.scores) / len(self.scores) if self.scores else float("nan")


def evaluate(setup: Setup) -> Evaluated:
    """Images and rewards on the held-out prompts at fixed seeds, sampled without noise."""
    offset = len(setup.prompts)
    requests = [Request(offset + i, ("evaluation", i)) for i in range(len(setup.held_out))]
    if not requests:
        return Evaluated(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), [])
    averaged = nullcontext()
    if setup.averaged is not None:
        averaged = swapped(setup.parameters, setup.averaged)
    with averaged:
        images = evaluation_sampler(setup)(requests).images
    weighted = [
        weight * reward.score(images, list(setup.held_out)).values
        for reward, weight in zip(setup.rewards, setup.config.rewards.values(), strict=True)
    ]
    return Evaluated(images, torch.stack(weighted).sum(0).tolist())


def keep_samples(folder: JobFolder, iteration: int, now: Evaluated, prompts: Sequence[str]) -> None:
    """Write the held-out images of an iteration and their rewards."""
    place = folder.samples / f"{iteration:05}"
    save_images(now.images, place)
    pairs = zip(prompts, now.scores, strict=True)
    write_json(place / "scores.json", [{"prompt": p, "reward": s} for p, s in pairs])


def keep(setup: Setup, folder: JobFolder, iteration: int, first: Evaluated, now: Evaluated) -> Path:
    """Write the samples, the report and the LoRA (or the network) of an iteration."""
    prompts, method = list(setup.held_out), setup.config.method
    if prompts:
        keep_samples(folder, iteration, now, prompts)
        pairs = list(zip(first.scores, now.scores, strict=True))
        before_after(first.images, now.images, prompts, pairs, folder.report / "before_after.png")
    title = f"{method.credit} credit, {method.objective}, lr {setup.config.optimizer.lr:g}"
    before = first.mean if prompts else None
    report.plot_run(folder.metrics(), before, folder.report / "curves.png", title)
    write_page(folder)
    return export(setup, folder, iteration)


def export(setup: Setup, folder: JobFolder, iteration: int) -> Path:
    """Write the LoRA (or the network) of an iteration."""
    method = setup.config.method
    name = f"pcpo_{iteration:05}.safetensors"
    metadata = {
        "pcpo_iteration": iteration,
        "pcpo_method": f"{method.credit}/{method.objective}",
        "pcpo_rewards": ", ".join(setup.config.rewards),
        "ss_base_model_version": getattr(setup.family, "base_model_version", "sd_v1"),
    }
    context = nullcontext()
    if setup.averaged is not None:
        context = swapped(setup.parameters, setup.averaged)
    with context:
        if setup.config.trainable.kind == "lora":
            return lora.export_lora(setup.family.network, folder.lora / name, metadata=metadata)
        return lora.export_unet(setup.family.network, folder.lora / name, metadata=metadata)


def last_export(folder: JobFolder) -> Path | None:
    """The last exported file of a run."""
    return next(reversed(folder.exports()), None)


def first_evaluation(
    setup: Setup, folder: JobFolder, progress: Progress, at: Position
) -> Evaluated:
    """The base model's images, made once; a resumed run reads them back."""
    files = [folder.samples / "00000" / f"{i:03}.png" for i in range(len(setup.held_out))]
    scores = folder.read_list("samples/00000/scores.json")
    if at.iteration > 0 and len(scores) == len(files) and all(file.is_file() for file in files):
        return Evaluated(load_images(files), [entry["reward"] for entry in scores])
    if at.iteration > 0:
        progress.say("the images of the base model are gone: the comparison starts from here")
    first = evaluate(setup)
    if setup.accelerator.is_main_process:
        keep_samples(folder, at.iteration, first, setup.held_out)
    progress.say(f"held-out reward before training: {first.mean:.3f}")
    return first

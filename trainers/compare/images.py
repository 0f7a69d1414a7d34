"""What a comparison measures on images: diversity within a prompt, and drift from the base.

All networks are sampled with one sampler, the held-out comparison's, from the same noise.
Shapes: n prompts, g images of each; b = n g images, ordered by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch

from ...pcpo.metrics.similarity import pixel_diversity, rms
from ..config.train_config import TrainConfig
from ..evaluate.comparison import Member
from ..evaluate.images import Model
from ..evaluate.sides import BASE
from ..job.files import write_json
from ..job.folder import JobFolder
from ..job.inputs import kept_prompts
from ..job.prompts import split_prompts
from ..memory.devices import device_of
from ..memory.trajectory_store import waiting_place
from ..report.images import Images
from ..run.sampler import Request, Sampler
from ..run.setup import storage_of
from .runs import Say

DRIFTS = ("drift_pixels", "drift_prediction")


def measure(members: Sequence[Member], prompts: int, images: int, say: Say) -> None:
    """Measure every export not measured yet, on `images` images of `prompts` held-out prompts.

    The numbers are kept in files.
    """
    for value in dict.fromkeys(member.value for member in members):
        probe: Probe | None = None
        for member in [member for member in members if member.value == value]:
            wanted = _fingerprints(member, prompts, images)
            kept = JobFolder(member.measures.parent).read(member.measures.name)
            found = {k: v for k, v in kept.items() if k in wanted and _is_of(v, wanted[k])}
            missing = [name for name in wanted if name not in found]
            if missing and probe is None:
                say("sampling the base model, for diversity and drift")
                probe = Probe(member.config, held_out_of(member, prompts), images, say)
            for name in missing:
                assert probe is not None
                export = None if name == BASE else member.folder.lora / name
                found[name] = {"of": wanted[name], **probe(export)}
                write_json(member.measures, found)
            if missing:
                ends = [found[name]["diversity"] for name in (BASE, list(wanted)[-1])]
                say(f"measured {member.name}: diversity {ends[0]:.4f} -> {ends[1]:.4f}")


def _is_of(measured: Any, wanted: list[Any]) -> bool:
    """Whether stored numbers are complete and belong to what is wanted."""
    is_whole = isinstance(measured, dict) and {"diversity", *DRIFTS} <= measured.keys()
    return is_whole and measured.get("of") == wanted


def _fingerprints(member: Member, prompts: int, images: int) -> dict[str, list[Any]]:
    """What each number of a run depends on; if it changes, the run is measured again."""
    settings = [prompts, images, member.folder.job()["inputs"]["model"]]
    found: dict[str, list[Any]] = {BASE: settings}
    for file in member.folder.exports().values():
        status = file.stat()
        found[file.name] = [*settings, status.st_size, status.st_mtime_ns]
    return found


class Probe:
    """Samples networks and compares them with their base, the network before training.

    Args:
        config: any run's of the comparison; model, prompts and evaluation are the same in all.
        prompts: that are drawn, held out of training.
        images: of each prompt, >= 2.
        say: called with what is loaded.
    """

    def __init__(self, config: TrainConfig, prompts: Sequence[str], images: int, say: Say) -> None:
        device = device_of(config.run.device)
        self.config, self.model = config, Model(config, prompts, device, say)
        self.images = images
        self.requests = [
            Request(i, ("diversity", i, j)) for i in range(len(prompts)) for j in range(images)
        ]
        plan = self.sampler.plan
        everywhere = replace(plan, trained=torch.ones(len(plan), dtype=torch.bool))
        base = self.sampler.under(everywhere)(self.requests)  # keeps what each step began from
        self.base, self.trajectory = base.images, base.trajectory

    @property
    def sampler(self) -> Sampler:
        """The run's own, of its held-out comparison."""
        run = self.config.run
        sampler = self.model.sampler(run.micro_batch)
        waits = waiting_place(run.store_on, sampler.device)
        return replace(sampler, options=storage_of(self.config), waits=waits)

    def __call__(self, export: Path | None) -> dict[str, float]:
        """Measure the network of an export, a LoRA or full weights; None is the base.

        Returns:
            "diversity" and "drift_pixels", RMS of pixels from 0 to 1, and "drift_prediction", a
            share of the base's mean square.
        """
        if export is None:
            return {"diversity": self.diversity(self.base)} | dict.fromkeys(DRIFTS, 0.0)
        self.model.become(export)
        images = self.sampler(self.requests).images
        numbers = (rms(images, self.base).mean().item(), self.prediction_drift())
        return {"diversity": self.diversity(images), **dict(zip(DRIFTS, numbers, strict=True))}

    def diversity(self, images: Images) -> float:
        """Mean RMS difference, over pixels from 0 to 1, of two images of one prompt."""
        return mean(pixel_diversity(group) for group in images.split(self.images))

    @torch.no_grad()
    def prediction_drift(self) -> float:
        """E|now - base|^2 / E|base|^2 of the guided predictions on the base's own trajectories."""
        sampler = self.sampler
        plan = sampler.plan
        difference = square = 0.0
        for start in range(0, len(self.requests), sampler.micro_batch):
            rows = slice(start, start + sampler.micro_batch)
            part = self.trajectory[rows]
            embeds = sampler.conditions(self.requests[rows]).to(sampler.device)
            for step, timestep in enumerate(plan.timesteps):
                base = part.prediction[:, step].to(sampler.device)
                x = part.x[:, step].to(sampler.device).float()
                now = sampler.policy(x, timestep, embeds)
                difference += (now - base).double().square().sum().item()
                square += base.double().square().sum().item()
        return difference / square


def held_out_of(member: Member, most: int) -> tuple[str, ...]:
    """The first prompts of a run's held-out comparison; those of its config in earlier versions."""
    config = member.config
    split = kept_prompts(member.folder) or split_prompts(config.prompts, config.run.eval_prompts)
    return split.held_out[:most]

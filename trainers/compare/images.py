"""What a comparison measures on images: diversity within a prompt, and drift from the base.

All networks are sampled with one sampler, the held-out comparison's, from the same noise.
Shapes: n prompts, g images of each; b = n g images, ordered by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from ..config.train_config import TrainConfig
from ..job.files import write_json
from ..job.folder import JobFolder
from ..job.inputs import kept_prompts
from ..job.prompts import PromptSplit
from ..lora import adapters
from ..run.sampler import Request
from ..run.setup import evaluation_sampler, prepare
from .runs import Say
from .setup import Member

Pixels = Float[Tensor, "b 3 h w"]
BASE = "base"  # its name among the exports


def measure(members: Sequence[Member], prompts: int, images: int, say: Say) -> None:
    """Measure every export not measured yet, on `images` images of `prompts` held-out prompts.

    The numbers are kept in files.
    """
    for value in dict.fromkeys(member.value for member in members):
        probe: Probe | None = None
        for member in [member for member in members if member.value == value]:
            wanted = _wanted(member, prompts, images)
            kept = JobFolder(member.measures.parent).read(member.measures.name)
            found = {k: v for k, v in kept.items() if k in wanted and _is_of(v, wanted[k])}
            missing = [name for name in wanted if name not in found]
            if missing and probe is None:
                say("sampling the base model, for diversity and drift")
                probe = Probe(member.config, prompts, images, kept_prompts(member.folder))
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


def _wanted(member: Member, prompts: int, images: int) -> dict[str, list[Any]]:
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
        prompts: number of held-out prompts, from the first.
        images: of each prompt, >= 2.
        split: the run's prompts; None for a run of an earlier version.
    """

    def __init__(
        self, config: TrainConfig, prompts: int, images: int, split: PromptSplit | None = None
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # another config may have run here
        self.setup = prepare(config, split=split)
        self.images = images
        self.sampler = evaluation_sampler(self.setup)
        offset, count = len(self.setup.prompts), min(prompts, len(self.setup.held_out))
        self.requests = [
            Request(offset + i, ("diversity", i, j)) for i in range(count) for j in range(images)
        ]
        everywhere = replace(
            self.sampler.plan, trained=torch.ones(len(self.sampler.plan), dtype=torch.bool)
        )
        base = self.sampler.under(everywhere)(self.requests)  # keeps what each step began from
        self.base, self.trajectory = _pixels(base.images), base.trajectory

    def __call__(self, export: Path | None) -> dict[str, float]:
        """Measure the network of an export, a LoRA or full weights; None is the base.

        Returns:
            "diversity" and "drift_pixels", RMS of pixels from 0 to 1, and "drift_prediction", a
                share
            of the base's mean square.
        """
        if export is None:
            return {"diversity": self.diversity(self.base)} | dict.fromkeys(DRIFTS, 0.0)
        network = self.setup.family.network
        if self.setup.config.trainable.kind == "lora":
            adapters.load_lora(network, export)
        else:
            network.load_state_dict(load_file(export))
        pixels = _pixels(self.sampler(self.requests).images)
        numbers = (rms(pixels - self.base).mean().item(), self.prediction_drift())
        return {"diversity": self.diversity(pixels), **dict(zip(DRIFTS, numbers, strict=True))}

    def diversity(self, pixels: Pixels) -> float:
        """Mean RMS difference, over pixels from 0 to 1, of two images of one prompt."""
        pairs = list(combinations(range(self.images), 2))
        groups = pixels.split(self.images)
        return torch.stack([rms(g[i] - g[j]) for g in groups for i, j in pairs]).mean().item()

    @torch.no_grad()
    def prediction_drift(self) -> float:
        """E|now - base|^2 / E|base|^2 of the guided predictions on the base's own trajectories."""
        sampler, plan = self.sampler, self.sampler.plan
        difference = square = 0.0
        for start in range(0, len(self.requests), sampler.micro_batch):
            rows = slice(start, start + sampler.micro_batch)
            part = self.trajectory[rows]
            chosen = [request.prompt for request in self.requests[rows]]
            embeds = sampler.embeds[chosen].to(sampler.device)
            for step, timestep in enumerate(plan.timesteps):
                base = part.prediction[:, step]
                now = sampler.policy(part.x[:, step].float(), timestep, embeds)
                difference += (now - base).double().square().sum().item()
                square += base.double().square().sum().item()
        return difference / square


DRIFTS = ("drift_pixels", "drift_prediction")


def _pixels(images: Tensor) -> Pixels:
    return images.float() / 255


def rms(difference: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b"]:
    """Root of the mean square over the last three axes.

    >>> rms(torch.tensor([0.0, 0.0, 3.0, 4.0]).reshape(1, 1, 2, 2)).item()
    2.5
    """
    return difference.square().mean((-3, -2, -1)).sqrt()

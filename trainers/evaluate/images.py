"""The images of an evaluation: equal prompts and seeds for every side, each made once.

    images/SIDE/PROMPT_SEED.png    existing files are not made again
    images/SIDE/prompts.json       the prompt of each file

An image's number decides which process makes it, and no process needs another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..config.train_config import TrainConfig
from ..families import load_family
from ..families.embeds import Embeds
from ..families.errors import ModelError
from ..families.weights import check_finite
from ..job.files import replacing, write_json
from ..job.preflight import files_of
from ..lora import adapters
from ..report.images import to_pil
from ..run.method import DTYPES
from ..run.plans import looking_plan
from ..run.policy import Policy
from ..run.sampler import Request, Sampler, images_at_once
from ..run.setup import latent_shape
from .sides import BASE, Side

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The images that every side needs.

    Attributes:
        prompts: of the evaluation.
        count: images of each, seeds 0 to `count` - 1.
        seed: the base seed of them all.
        batch: images per forward pass.
        config: model, sampler and the evaluation's steps and noise.
    """

    prompts: tuple[str, ...]
    count: int
    seed: int
    batch: int
    config: TrainConfig

    @property
    def order(self) -> list[tuple[int, int]]:
        """Prompt and seed of every image."""
        return [(i, j) for i in range(len(self.prompts)) for j in range(self.count)]


def file_of(folder: Path, prompt: int, seed: int) -> Path:
    return folder / f"{prompt:05}_{seed:05}.png"


def list_prompts(folder: Path, wanted: Wanted) -> None:
    """Write a side's prompts.json."""
    listed = {file_of(folder, i, j).name: wanted.prompts[i] for i, j in wanted.order}
    write_json(folder / "prompts.json", listed)


def missing_of(folder: Path, wanted: Wanted) -> list[tuple[int, int]]:
    """Prompt and seed of the images that are not made yet."""
    there = {file.name for file in folder.glob("*.png")} if folder.is_dir() else set()
    return [(i, j) for i, j in wanted.order if file_of(folder, i, j).name not in there]


def make_images(
    sides: Sequence[Side],
    images: Path,
    wanted: Wanted,
    device: torch.device,
    share: tuple[int, int],
    say: Say,
) -> None:
    """Make the missing images of a process's share.

    Args:
        sides: to sample, the base first.
        images: folder of the sides' folders.
        wanted: of every side.
        device: to compute on.
        share: this process's number, and the number of processes.
        say: called with what is done.
    """
    rank, processes = share
    model: Model | None = None
    for side in sides:
        folder = images / side.name
        mine = set(wanted.order[rank::processes])
        missing = [at for at in missing_of(folder, wanted) if at in mine]
        if not missing:
            continue
        model = model or Model(wanted, device, say)
        model.become(side)
        say(f"sampling {side.name}: {len(missing)} of {len(mine)} images")
        for start in range(0, len(missing), wanted.batch):
            some = missing[start : start + wanted.batch]
            for at, pixels in zip(some, model.sample(some), strict=True):
                with replacing(file_of(folder, *at)) as fresh:
                    to_pil(pixels).save(fresh, "PNG")


class Model:
    """A model that takes the weights of one side after another.

    Args:
        wanted: the images to draw.
        device: to compute on.
        say: called with what is loaded.
    """

    def __init__(self, wanted: Wanted, device: torch.device, say: Say) -> None:
        self.wanted, self.device, self.say = wanted, device, say
        config = wanted.config
        self.state = BASE  # "weights" and "lora" of a network that is not the base any more
        family = self._family("all")
        texts = [*wanted.prompts, config.sampler.negative_prompt]
        embeds = Embeds.joined([family.encode([text]) for text in texts])
        self.embeds, self.negative = embeds[:-1].to("cpu"), embeds[-1:].to(device)
        self.shape = latent_shape(family, config.model)
        run = config.run
        plan = looking_plan(family, self.shape, run.eval_steps, run.eval_noise, config.sampler)
        self.plan = plan.to(device)
        self.family = family

    def become(self, side: Side) -> None:
        """Put a side's weights on the network; the base's are reloaded if they are gone."""
        if side.path is None:
            self._fresh()
            return
        if is_lora(side.path):
            self._load_lora(side.path)
            return
        if self.state == "lora":
            self._fresh()
        weights = load_file(side.path)
        check_finite(weights, side.path.name)
        self.family.network.load_state_dict(weights)
        self.state = "weights"

    def _load_lora(self, path: Path) -> None:
        if self.state == "weights":
            self._fresh()
        try:
            adapters.load_lora(self.family.network, path)
        except ModelError:
            if self.state != "lora":
                raise
            self._fresh()  # another rank, or other layers, than the LoRA before it
            adapters.load_lora(self.family.network, path)
        self.state = "lora"

    def _fresh(self) -> None:
        if self.state != BASE:
            self.family = self._family("network")
            self.state = BASE

    def _family(self, parts: Any) -> Any:
        model = self.wanted.config.model
        self.say(f"loading {model.source}")
        return load_family(
            files_of(model),
            dtype=DTYPES[model.precision],
            device=self.device,
            prediction_type=None if model.prediction_type == "auto" else model.prediction_type,
            allow_download=model.allow_download,
            parts=parts,
            settings=model.model_dump(),
        )

    @torch.no_grad()
    def sample(self, some: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Images at prompts and seeds, uint8 (b, 3, h, w)."""
        wanted = self.wanted
        scale = wanted.config.sampler.guidance_scale
        policy = Policy(self.family, torch.no_grad, scale, "both", self.negative)
        size = images_at_once(wanted.batch, self.device)
        sampler = Sampler(policy, self.plan, self.embeds, self.shape, size, self.device, {})
        return sampler([Request(i, ("sample", wanted.seed, i, j)) for i, j in some]).images


def is_lora(file: Path) -> bool:
    """Whether a file of weights is a LoRA; else it is a whole network's."""
    with safe_open(file, framework="pt") as opened:
        return any("lora" in key.lower() for key in opened.keys())  # noqa: SIM118

"""The images of an evaluation: equal prompts and seeds for every side, each made once.

    images/SIDE/PROMPT_SEED.png    existing files are not made again
    images/SIDE/prompts.json       the prompt of each file

An image's number decides which process makes it, and no process needs another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..config.train_config import TrainConfig
from ..families import Family, Parts
from ..families.errors import ModelError
from ..families.weights import check_finite
from ..job.files import replace_file, write_json
from ..lora import adapters
from ..memory.low_bit import pack_base
from ..memory.offload import decoding, is_offloaded, place
from ..report.images import to_pil
from ..run.conditioning import load_conditioning
from ..run.method import DTYPES
from ..run.plans import looking_plan
from ..run.sampler import Policy, Request, Sampler, images_at_once
from ..run.setup import latent_shape, load_model
from .sides import BASE, Side

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The images that every side needs.

    Attributes:
        count: images of each, seeds 0 to `count` - 1.
        seed: the base seed of them all.
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
        model = model or Model(wanted.config, wanted.prompts, device, say)
        model.become(side.path)
        sampler = model.sampler(images_at_once(wanted.batch, device))
        say(f"sampling {side.name}: {len(missing)} of {len(mine)} images")
        for start in range(0, len(missing), wanted.batch):
            some = missing[start : start + wanted.batch]
            requests = [Request(i, ("sample", wanted.seed, i, j)) for i, j in some]
            with torch.no_grad():
                drawn = sampler(requests).images
            for at, pixels in zip(some, drawn, strict=True):
                with replace_file(file_of(folder, *at)) as fresh:
                    to_pil(pixels).save(fresh, "PNG")


class Model:
    """A config's model without its training, which takes one file of weights after another.

    Embeddings, precision and places in memory are those of training.

    Args:
        config: model, sampler and the evaluation's steps and noise.
        say: called with what is loaded.
    """

    def __init__(
        self, config: TrainConfig, prompts: Sequence[str], device: torch.device, say: Say
    ) -> None:
        self.config, self.device, self.say = config, device, say
        self.told = load_conditioning(config, (), prompts, lambda: self._load("text"), say)
        self.state = BASE  # "weights" and "lora" of a network that is not the base any more
        self.family = self._load_on_device(None)

    def become(self, file: Path | None) -> None:
        """Put a file's weights on the network; the base's, of None, are reloaded if gone."""
        if file is None:
            if self.state != BASE:
                self.family = self._load_on_device(None)
        elif not is_lora(file):
            if self.state == "lora":
                self.family = self._load_on_device(None)
            weights = load_file(file)
            check_finite(weights, file.name)
            self.family.network.load_state_dict(weights)
            self.state = "weights"
        elif self.state == "weights" or (self.state == BASE and self.config.model.base != "same"):
            self.family = self._load_on_device(file)
        else:
            try:
                adapters.load_lora(self.family.network, file)
                self.state = "lora"
            except ModelError:
                if self.state != "lora":
                    raise
                self.family = self._load_on_device(
                    file
                )  # another rank, or other layers, than before

    def _load_on_device(self, lora: Path | None) -> Family:
        """Load the base, with a LoRA or without, and put it on the device."""
        family, model = self._load("network"), self.config.model
        if lora is not None:
            adapters.load_lora(family.network, lora)
        if model.base != "same":
            pack_base(family.network, model.base, self.device, waits=model.offload == "blocks")
        place(family, self.device, model.offload)
        self.state = BASE if lora is None else "lora"
        return family

    def _load(self, parts: Parts) -> Family:
        self.say(f"loading {self.config.model.source}")
        where = self.device if parts == "text" else torch.device("cpu")
        return load_model(self.config, where, parts)

    def sampler(self, size: int) -> Sampler:
        """Draws with the present weights, `size` images per forward pass."""
        run, points, device = self.config.run, self.config.sampler, self.device
        shape = latent_shape(self.family, self.config.model)
        plan = looking_plan(self.family, shape, run.eval_steps, run.eval_noise, points).to(device)
        dtype = DTYPES[self.config.model.precision]
        autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        negative = self.told.negative.to(device)
        policy = Policy(self.family, autocast, points.guidance_scale, "both", negative)
        is_lent = is_offloaded(self.config.model.offload, device)
        decode = decoding(self.family, device, is_lent=is_lent)
        return Sampler(policy, plan, self.told.embeds, shape, size, device, {}, decoding=decode)


def is_lora(file: Path) -> bool:
    """Whether a file of weights is a LoRA; else it is a whole network's."""
    with safe_open(file, framework="pt") as opened:
        return any("lora" in key.lower() for key in opened.keys())  # noqa: SIM118

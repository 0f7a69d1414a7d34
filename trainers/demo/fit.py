"""Train the demo models' networks: one loop, and a recipe for each model.

A step's data are a function of its number, so an interrupted run resumes as if nothing had
happened.
"""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...pcpo import scenes
from . import tokenizer as bpe


@dataclass(frozen=True, slots=True)
class Settings:
    """How a network and its text encoder are trained.

    Attributes:
        lr: peak learning rate; linear warm-up, then half a cosine.
        caption_dropout: share of empty captions, so that guidance works.
        ema: decay of the averaged weights that are shipped.
        seed: of the weights, captions, noise and order.
        evaluate_every: steps between evaluations, each of which keeps the averaged weights.
    """

    steps: int = 6000
    batch: int = 64
    lr: float = 1e-3
    caption_dropout: float = 0.1
    ema: float = 0.995
    seed: int = 0
    evaluate_every: int = 500


S = TypeVar("S", bound=Settings, contravariant=True)


class Recipe(Protocol[S]):
    """What differs between the demo models."""

    def new_model(self) -> nn.ModuleDict:
        """A network and its text encoder, with fresh weights."""
        ...

    def loss(self, model: nn.ModuleDict, step: int, settings: S, draw: torch.Generator) -> Tensor:
        """The loss of one step; all randomness comes from `draw` and the step's number."""
        ...

    def evaluate(self, model: nn.ModuleDict) -> str:
        """The model's quality, for the log."""
        ...

    def save(self, folder: Path, model: nn.ModuleDict) -> None:
        """Write a pipeline folder."""
        ...


def fit(folder: Path, recipe: Recipe[S], settings: S) -> None:
    """Train, or resume from the folder's `state.pt`; averaged weights are kept as `STEP/`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = recipe.new_model()
    averaged = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=1e-3)
    state_file, start = folder / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.monotonic()
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        draw = torch.Generator().manual_seed(settings.seed * 1_000_000 + step)
        loss = recipe.loss(model, step, settings, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema, (step + 1) / (step + 10))
        for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            print(
                f"{step + 1}/{settings.steps} loss {loss.item():.4f} {recipe.evaluate(averaged)}, "
                f"{seconds:.2f} s/step",
                flush=True,
            )
            recipe.save(folder / str(step + 1), averaged)
            _save_state(state_file, step + 1, settings, model, averaged, optimizer)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over 100 steps, on half a cosine down to 0."""
    warm = min(1.0, (step + 1) / 100)
    return settings.lr * warm * (1 + math.cos(math.pi * step / settings.steps)) / 2


def captions(chosen: Tensor, rng: np.random.Generator, dropout: float) -> list[str]:
    """A fresh sentence for each scene, from the view of either thing, or an empty one."""
    training = scenes.split().training

    def caption(scene: scenes.Scene) -> str:
        if rng.random() < dropout:
            return ""
        return scenes.describe(scenes.either_way(scene, rng), rng)

    return [caption(training[i]) for i in chosen.tolist()]


def tidy(folder: Path, positions: int = bpe.MAX_LENGTH) -> None:
    """Make a pipeline's folder readable by every version, with nothing of this machine in it.

    `positions` are the text encoder's.
    """
    bpe.write(folder / "tokenizer", positions)  # vocab.json and merges.txt
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    # diffusers notes where the part came from, and a field that its own class warns about
    config = folder / "vae" / "config.json"
    fields = json.loads(config.read_text("utf-8"))
    kept = {k: v for k, v in fields.items() if k not in ("block_out_channels", "_name_or_path")}
    config.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def _save_state(
    file: Path,
    step: int,
    settings: Settings,
    model: nn.ModuleDict,
    averaged: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
) -> None:
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    state = {name: part.state_dict() for name, part in parts.items()}
    fresh = file.with_suffix(".tmp")
    torch.save(state | {"step": step, "settings": asdict(settings)}, fresh)
    fresh.replace(file)

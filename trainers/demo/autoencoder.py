"""The demo's autoencoder: TAESD's architecture at its own width, trained on drawn scenes.

ComfyUI's TAESD class fixes width 64 and the numbers of blocks, so they are diffusers' defaults.
A loss draws latents to zero mean and unit variance per channel, so that a scaling factor of 1 is
right and the noise schedule of Stable Diffusion fits them.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from ...pcpo import scenes


@dataclass(frozen=True, slots=True)
class Settings:
    """How the autoencoder is trained.

    Attributes:
        crop_steps: steps of these on crops of 32 px; they cost a quarter and miss little.
        pictures: whole pictures per step, after the crops.
        lr: peak learning rate of a one-cycle schedule.
        moment_weight: weight of the loss on the latents' mean and covariance.
        seed: of the weights, the drawings and their order.
    """

    steps: int = 3200
    crop_steps: int = 2700
    crops: int = 32
    pictures: int = 8
    lr: float = 1e-3
    moment_weight: float = 0.05
    seed: int = 0
    save_every: int = 100


CROP = 32  # px


def batch(step: int, settings: Settings) -> Tensor:
    """Fresh drawings of random training scenes, or crops of them, in [-1, 1]."""
    rng = np.random.default_rng((settings.seed, step))
    cropped = step < settings.crop_steps
    training = scenes.split().training
    chosen = rng.integers(len(training), size=settings.crops if cropped else settings.pictures)
    drawn = [scenes.draw(training[i], rng) for i in chosen]
    if cropped:
        drawn = [crop(picture, rng) for picture in drawn]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop that shows something of a thing."""
    is_thing = np.abs(picture.astype(int) - picture[0, 0]).sum(-1) > 90
    rows, columns = np.nonzero(is_thing)
    pick = rng.integers(len(rows))
    y, x = (int(np.clip(v[pick] - rng.integers(CROP), 0, 64 - CROP)) for v in (rows, columns))
    return picture[y : y + CROP, x : x + CROP]


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over the first 3% of the steps, then half a cosine down to 1%."""
    warm = max(1, round(0.03 * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    part = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


def loss_of(vae: AutoencoderTiny, x: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The training loss and, for the log, the mean absolute error of pixels in [-1, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encoder(x)
        decoded = vae.decoder(latents)
    error = (decoded.float() - x).abs().mean()
    squared = F.mse_loss(decoded.float(), x)
    z = latents.float().movedim(1, 0).flatten(1)  # (4, everything else)
    moments = z.mean(1).square().mean() + (z.cov() - torch.eye(len(z))).square().mean()
    return error + squared + settings.moment_weight * moments, error.detach()


def train(folder: Path, settings: Settings) -> AutoencoderTiny:
    """Train to the last step, from the folder's checkpoint `state.pt` if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    vae = AutoencoderTiny()
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.lr, weight_decay=1e-4)
    state_file, start = folder / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.monotonic()
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        x = batch(step, settings)
        loss, error = loss_of(vae, x.contiguous(memory_format=torch.channels_last), settings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            print(
                f"{step + 1}/{settings.steps} loss {loss.item():.4f} error {error.item():.4f} "
                f"{seconds:.2f} s/step",
                flush=True,
            )
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            state = {
                "vae": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "settings": asdict(settings),
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    vae.save_pretrained(folder / "vae")
    return vae.eval()

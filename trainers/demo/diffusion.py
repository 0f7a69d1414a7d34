"""The demo's text encoder and UNet, trained together on cached latents.

Widths are what ComfyUI's SD1.x classes can express: channels a multiple of 32 and each level an
integer multiple of the first, 32 norm groups, 8 attention heads (the class forces 8), quick_gelu.
"""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...pcpo import Ddim, ddim_grid, noise_streams, plan_diffusion, rollout, scenes
from ...pcpo.credit import Native
from ...pcpo.plan import deterministic
from ...pcpo.rewards import load_reward
from ...pcpo.schedules import scaled_linear_alpha_bars
from . import tokenizer as bpe
from .latents import Latents

WIDTH = 64  # of the text encoder


@dataclass(frozen=True, slots=True)
class Settings:
    """How the diffusion model is trained.

    Attributes:
        steps: optimizer steps in all.
        batch: latents a step.
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


def new_text_encoder(tokenizer: Any) -> CLIPTextModel:
    """A CLIP text encoder of two small layers for the demo's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An SD1.x UNet of two levels. `attention_head_dim` is the NUMBER of heads in SD1.x configs."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids of captions, padded to 77 with the end token as SD1.x does."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def loss_of(model: nn.ModuleDict, ids: Tensor, latents: Tensor, rng: torch.Generator) -> Tensor:
    """The epsilon loss of Ho et al. 2020 at uniformly random timesteps."""
    alpha_bars = scaled_linear_alpha_bars().float()
    t = torch.randint(len(alpha_bars), (len(latents),), generator=rng)
    noise = torch.randn(latents.shape, generator=rng)
    a = alpha_bars[t].reshape(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    # captions repeat, and the encoder is a good part of the cost: each distinct one once
    distinct, rows = ids.unique(dim=0, return_inverse=True)
    embeds = model["text_encoder"](distinct).last_hidden_state[rows]
    return F.mse_loss(model["unet"](noisy, t, embeds).sample, noise)


def captions(chosen: Tensor, rng: np.random.Generator, dropout: float) -> list[str]:
    """A fresh sentence for each scene, told from either thing, or nothing at all."""
    training = scenes.split().training

    def caption(scene: scenes.Scene) -> str:
        if rng.random() < dropout:
            return ""
        return scenes.describe(scenes.either_way(scene, rng), rng)

    return [caption(training[i]) for i in chosen.tolist()]


@torch.no_grad()
def evaluate(
    model: nn.ModuleDict, vae: AutoencoderTiny, tokenizer: CLIPTokenizer, eta: float
) -> float:
    """Mean scene reward on the 64 held-out prompts: guidance 1, 10 DDIM steps, fixed seeds."""
    prompts = list(scenes.split().held_out)
    embeds = model["text_encoder"](token_ids(tokenizer, prompts)).last_hidden_state
    noise = noise_streams([("evaluation", i) for i in range(len(prompts))], 10, (4, 8, 8))
    grid = ddim_grid(10)
    plan = plan_diffusion(grid, Ddim(), Native())
    if eta == 0:
        plan = deterministic(plan, grid, Ddim(), "epsilon")

    def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
        return model["unet"](x, timestep, embeds).sample

    sampled = rollout(denoiser, plan.to("cpu"), noise).final
    images = vae.decoder(sampled).clamp(-1, 1)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    return load_reward("scene").score(pixels, prompts).values.mean().item()


def train(
    folder: Path,
    vae: AutoencoderTiny,
    data: Latents,
    tokenizer: CLIPTokenizer,
    settings: Settings,
) -> None:
    """Train, or go on from the folder's checkpoint; averaged weights are kept as `STEP/`.

    Args:
        folder: where the checkpoint `state.pt` and the pipelines are written.
        vae: the trained autoencoder.
        data: cached latents.
        tokenizer: the demo's tokenizer.
        settings: how to train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = nn.ModuleDict({"text_encoder": new_text_encoder(tokenizer), "unet": new_unet()})
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
        rng = np.random.default_rng((settings.seed, step))
        draw = torch.Generator().manual_seed(settings.seed * 1_000_000 + step)
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = settings.lr * warm * (1 + math.cos(math.pi * step / settings.steps)) / 2
        rows = torch.randint(len(data.scene), (settings.batch,), generator=draw)
        ids = token_ids(tokenizer, captions(data.scene[rows], rng, settings.caption_dropout))
        loss = loss_of(model, ids, data.latents[rows].float(), draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(settings.ema, (step + 1) / (step + 10))
        for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            seconds = (time.monotonic() - began) / (step + 1 - start)
            scores = [evaluate(averaged, vae, tokenizer, eta) for eta in (0.0, 1.0)]
            print(
                f"{step + 1}/{settings.steps} loss {loss.item():.4f} scene score "
                f"{scores[0]:.3f} (eta 0) {scores[1]:.3f} (eta 1), {seconds:.2f} s/step",
                flush=True,
            )
            save_pipeline(folder / str(step + 1), averaged, vae, tokenizer)
            _save_state(state_file, step + 1, settings, model, averaged, optimizer)


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


def save_pipeline(
    folder: Path, model: nn.ModuleDict, vae: AutoencoderTiny, tokenizer: CLIPTokenizer
) -> None:
    """Write a diffusers StableDiffusionPipeline folder in half precision."""
    parts = deepcopy({"unet": model["unet"], "text_encoder": model["text_encoder"], "vae": vae})
    others: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(
        **{name: part.half().eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=new_scheduler(),  # pyright: ignore[reportArgumentType] (it is one of them)
        requires_safety_checker=False,
        **others,
    ).save_pretrained(folder)
    bpe.write(folder / "tokenizer")  # vocab.json and merges.txt, which every version reads
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    # diffusers notes where the part came from, and a field that its own class warns about
    config = folder / "vae" / "config.json"
    fields = json.loads(config.read_text("utf-8"))
    kept = {k: v for k, v in fields.items() if k not in ("block_out_channels", "_name_or_path")}
    config.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")

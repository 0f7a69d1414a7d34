"""The demo's flow model: an SD3 transformer and its text encoder, on 16-channel latents.

The transformer's width is 64 times its depth, with heads of 64, because ComfyUI infers depth and
heads of an SD3 model from the width. It starts from `tiny_sd`: the autoencoder is that model's,
spread over 16 channels, and so is the text encoder, with one more layer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ...pcpo import FlowSde, flow_grid, noise_streams, plan_flow, rollout, scenes
from ...pcpo.credit import Native
from ...pcpo.plan import deterministic
from ...pcpo.rewards import load_reward
from ...pcpo.schedules import shift_sigmas
from .fit import Settings, captions, tidy
from .latents import Latents

DEPTH = 3
WIDTH = 64 * DEPTH
TEXT_WIDTH = 64
POSITIONS = 24  # of a prompt; the grammar's longest sentence has 10 words and two ends
CHANNELS = 16
SHIFT = 3.0  # SD3's, towards noise

Prompts = tuple[Tensor, Tensor]
"""(b, 24, 64) tokens and (b, 64) pooled vectors."""


# --- parts ---------------------------------------------------------------------------------------


def new_transformer() -> SD3Transformer2DModel:
    """SD3.5's transformer, three blocks deep; its modulations and its output begin at zero."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=DEPTH,
        attention_head_dim=64,
        num_attention_heads=DEPTH,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return transformer


def new_text_encoder(start: CLIPTextModel) -> CLIPTextModelWithProjection:
    """A text encoder that continues `tiny_sd`'s, with a third layer.

    SD3 attends to the states before the last layer, so these are the ones that `start` ends with.
    """
    changed = {"num_hidden_layers": 3, "max_position_embeddings": POSITIONS, "dtype": "float32"}
    config = CLIPTextConfig.from_dict(start.config.to_dict() | changed)
    model = CLIPTextModelWithProjection(config).float()
    state = {k.removeprefix("text_model."): v.float() for k, v in start.state_dict().items()}
    for name, value in model.text_model.state_dict().items():
        if name in state and "position_ids" not in name:
            value.copy_(state[name][:POSITIONS] if "position_embedding" in name else state[name])
    return model


def frame() -> Float[Tensor, "16 4"]:
    """Four orthogonal columns of +-1: the first four of a Hadamard matrix of 16 rows."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    whole = torch.kron(two, torch.kron(two, torch.kron(two, two)))
    return whole[:, :4]


@torch.no_grad()
def spread(vae: AutoencoderTiny) -> AutoencoderTiny:
    """The same autoencoder with 16 latent channels in place of its 4; its pictures are nearly the
    same.

    Each channel is a sum or difference of the four, halved: zero mean and unit variance stay (the
    four have unit variance and are uncorrelated), and the decoder, which undoes it, averages over
    four times as many numbers.
    """
    wide, mix = AutoencoderTiny(latent_channels=CHANNELS), frame() / 2
    state = {name: value.float() for name, value in vae.state_dict().items()}
    last = len(vae.encoder.layers) - 1
    for name in (f"encoder.layers.{last}.weight", f"encoder.layers.{last}.bias"):
        state[name] = torch.einsum("oi,i...->o...", mix, state[name])
    first = "decoder.layers.0.weight"
    state[first] = torch.einsum("oi,hi...->ho...", mix / 4, state[first])
    wide.load_state_dict(state)
    return wide.eval()


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlowSettings(Settings):
    """As `Settings`, with two parts of a run.

    Attributes:
        careful_steps: steps at the start that use only latents of correctly captioned pictures.
    """

    steps: int = 2400
    evaluate_every: int = 200
    careful_steps: int = 2000


@dataclass(frozen=True, slots=True)
class FlowRecipe:
    """What the flow model is trained on.

    Attributes:
        vae: with 16 channels.
        tokenizer: the demo's, for 24 positions.
        start: whose text encoder the new one continues.
    """

    vae: AutoencoderTiny
    data: Latents
    tokenizer: CLIPTokenizer
    start: CLIPTextModel

    def new_model(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {"text_encoder": new_text_encoder(self.start), "transformer": new_transformer()}
        )

    def loss(
        self, model: nn.ModuleDict, step: int, settings: FlowSettings, draw: torch.Generator
    ) -> Tensor:
        """The velocity loss, at sigmas distributed as the sampler's: shifted by 3 towards noise."""
        rng = np.random.default_rng((settings.seed, step))
        rows = self._rows(step, settings, draw)
        ids = self._ids(captions(self.data.scene[rows], rng, settings.caption_dropout))
        clean = self.data.latents[rows].float()
        sigma = shift_sigmas(torch.rand(len(clean), generator=draw), SHIFT)
        noise = torch.randn(clean.shape, generator=draw)
        at = sigma.reshape(-1, 1, 1, 1)
        # captions repeat: each distinct one is encoded once
        distinct, back = ids.unique(dim=0, return_inverse=True)
        tokens, pooled = self._encode(model, distinct)
        noisy = (1 - at) * clean + at * noise
        predicted = _velocity(model, noisy, sigma, (tokens[back], pooled[back]))
        return F.mse_loss(predicted, noise - clean)

    def _rows(self, step: int, settings: FlowSettings, draw: torch.Generator) -> Tensor:
        is_right = ~self.data.is_light
        allowed = is_right if step < settings.careful_steps else torch.ones_like(is_right)
        among = allowed.nonzero()[:, 0]
        return among[torch.randint(len(among), (settings.batch,), generator=draw)]

    def _ids(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=POSITIONS, return_tensors="pt"
        )
        return tokens.input_ids

    def _encode(self, model: nn.ModuleDict, ids: Tensor) -> Prompts:
        out = model["text_encoder"](ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    @torch.no_grad()
    def evaluate(self, model: nn.ModuleDict) -> str:
        """Mean scene reward on the 64 held-out prompts, 10 steps, without and with noise."""
        prompts = list(scenes.split().held_out)
        embeds = self._encode(model, self._ids(prompts))
        keys = [("evaluation", i) for i in range(len(prompts))]
        noise = noise_streams(keys, 10, (CHANNELS, 8, 8))
        grid, sde = flow_grid(10, shift=SHIFT), FlowSde(0.7)
        noisy = plan_flow(grid, sde, Native())
        scores = []
        for plan in (deterministic(noisy, grid, sde), noisy):

            def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
                return _velocity(model, x, timestep.expand(len(x)), embeds)

            sampled = rollout(denoiser, plan.to("cpu"), noise).final
            images = ((self.vae.decoder(sampled).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            scores.append(load_reward("scene").score(images, prompts).values.mean().item())
        return f"scene score {scores[0]:.3f} (ODE) {scores[1]:.3f} (SDE, a 0.7)"

    def save(self, folder: Path, model: nn.ModuleDict) -> None:
        parts = {"transformer": model["transformer"], "text_encoder": model["text_encoder"]}
        halves = {name: deepcopy(part).half().eval() for name, part in parts.items()}
        without = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        kind: Any = StableDiffusion3Pipeline  # annotated as if no part could be missing
        pipeline = kind(
            **halves,
            **dict.fromkeys(without),
            vae=deepcopy(self.vae).half(),
            tokenizer=self.tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        )
        pipeline.save_pretrained(folder)
        tidy(folder, POSITIONS)


def _velocity(model: nn.ModuleDict, x: Tensor, sigma: Tensor, prompts: Prompts) -> Tensor:
    tokens, pooled = prompts
    return model["transformer"](
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        return_dict=False,
    )[0]

"""Images of two MODELs at equal prompts and seeds, by ComfyUI's own sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo.rewards import Images
from ..errors import NodeError
from ..guidance.nodes import check_family
from ..host import num_patches
from ..names import checked_lora
from ..rewards import score as rewards_score
from ..sockets import SEEDS
from ..training.host import lora_path

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """A MODEL that is compared.

    Attributes:
        name: for the grid and the table.
        guider: makes the guider that samples; ComfyUI's classifier-free one if None.
    """

    name: str
    model: Any
    clip: Any
    guider: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What both sides draw, and how.

    Attributes:
        seeds: of the images of each prompt.
        cfg: classifier-free guidance, 1 is none.
        size: width and height, px.
    """

    prompts: tuple[str, ...]
    negative: str
    seeds: tuple[int, ...]
    cfg: float
    sampler: Any
    sigmas: Float[Tensor, " n_plus_1"]
    size: tuple[int, int]
    batch: int

    @property
    def images(self) -> int:
        """Of one side."""
        return len(self.prompts) * len(self.seeds)

    @property
    def prompt_of_each(self) -> list[str]:
        """Of one side's images."""
        return [text for text in self.prompts for _ in self.seeds]

    @property
    def steps(self) -> int:
        """Of the sampler."""
        return len(self.sigmas) - 1


def plan_of(
    prompts: str,
    negative: str,
    cfg: float,
    sampler: Any,
    sigmas: Float[Tensor, " n_plus_1"],
    size: tuple[int, int],
    count: int,
    batch: int,
    seed: int,
) -> Plan:
    """What the widgets ask for; `NodeError` if that makes no image.

    Args:
        prompts: one per line.
        count: images of each prompt.
        seed: of each prompt's first image.
    """
    texts, seeds = tuple(rewards_score.lines_of(prompts)), seeds_from(seed, count)
    plan = Plan(texts, negative, seeds, cfg, sampler, sigmas, size, batch)
    check_plan(plan)
    return plan


def seeds_from(first: int, count: int) -> tuple[int, ...]:
    """That many consecutive seeds.

    >>> seeds_from(2**64 - 1, 2)
    (18446744073709551615, 0)
    """
    return tuple((first + i) % SEEDS for i in range(count))


def check_plan(plan: Plan) -> None:
    """Refuse a plan that makes no image."""
    if not plan.prompts:
        raise NodeError("prompts is empty; write one prompt per line")
    if plan.steps < 1:
        raise NodeError(
            f"SIGMAS hold {len(plan.sigmas)} values, which make no step; give at least two"
        )


# --- the sides -----------------------------------------------------------------------------------


def check_clip(clip: Any) -> None:
    """Refuse a checkpoint without a text encoder."""
    if clip is None:
        raise NodeError("clip is empty: its checkpoint holds no text encoder; use Load CLIP")


def side_of(model: Any, clip: Any) -> Side:
    """A MODEL that is compared with none."""
    check_clip(clip)
    return Side("model", model, clip)


def sides_of(
    models: tuple[Any, Any], clips: tuple[Any, Any], loras: tuple[str, str]
) -> tuple[Side, Side]:
    """The two sides, each with its LoRA on it.

    Args:
        models: MODELs; where the second is None, the first is meant.
        loras: files in models/loras, or `NONE`.
    """
    check_clip(clips[0])
    first, second = models[0], models[1] if models[1] is not None else models[0]
    texts = clips[0], clips[1] if clips[1] is not None else clips[0]
    if first is second and texts[0] is texts[1] and loras[0] == loras[1]:
        raise NodeError(
            "both sides are the same MODEL; connect another one to model_b, or choose a LoRA in "
            "lora_b"
        )
    if type(first.model) is not type(second.model):
        ours, theirs = type(first.model).__name__, type(second.model).__name__
        raise NodeError(
            f"model_a is a {ours} and model_b a {theirs}, which draw with different sigmas and "
            "VAEs; compare models of one family"
        )
    return (
        _side("model_a", first, texts[0], loras[0]),
        _side("model_b" if second is not first else "model_a", second, texts[1], loras[1]),
    )


def _side(name: str, model: Any, clip: Any, lora: str) -> Side:
    """A side, with a LoRA at strength 1 as Load LoRA puts it on."""
    file = lora_path(lora)
    if file is None:
        return Side(name, model, clip)
    import comfy.sd
    import comfy.utils

    weights = checked_lora(comfy.utils.load_torch_file(str(file), safe_load=True), lora)
    tuned, text = comfy.sd.load_lora_for_models(model, clip, weights, 1.0, 1.0)
    if _patches(tuned, text) == _patches(model, clip):
        raise NodeError(
            f"the LoRA {lora!r} changes nothing in this MODEL and CLIP; it was made for another "
            "family"
        )
    return Side(Path(lora).stem, tuned, text)


def _patches(model: Any, clip: Any) -> int:
    return num_patches(model) + num_patches(clip.patcher)


def at_gammas(base: Any, tuned: Any, clip: Any, gammas: Sequence[float]) -> list[Side]:
    """A side for each gamma of Implicit Reward Guidance; `tuned` is a guider's."""
    from ..guidance.guider import ImplicitRewardGuider

    check_clip(clip)
    check_family(base, [tuned])
    return [
        Side(
            f"gamma {gamma:g}",
            base,
            clip,
            partial(ImplicitRewardGuider, base, [replace(tuned, gamma=gamma)]),
        )
        for gamma in gammas
    ]


# --- images --------------------------------------------------------------------------------------


Conditioning = list[Any]
Prompts = tuple[list[Conditioning], Conditioning]
"""Each prompt, and the negative one."""


def images_of(
    sides: Sequence[Side], plan: Plan, vae: Any, tick: Tick
) -> tuple[Images, list[str | None]]:
    """The images of all sides: side by side, prompt by prompt, seed by seed.

    All texts come first, then all of each side's latents, then the images, so that every network is
    loaded once.

    Args:
        tick: told how many steps of images and images are done; may raise.
    """
    texts = {id(side.clip): side.clip for side in sides}
    known = {key: _encode(clip, plan, tick) for key, clip in texts.items()}
    latents, done = list[Tensor](), 0
    for side in sides:
        for part in _sample(side, known[id(side.clip)], plan, tick, done):
            latents.append(part)
            done += len(part) * plan.steps
    pixels, why = list[Images](), list[str | None]()
    for part in latents:
        decoded = _decode(vae, part)
        pixels.append(rewards_score.to_pixels(decoded))
        why += rewards_score.faults(decoded)
        tick(done + len(why))
    return torch.cat(pixels), why


def _encode(clip: Any, plan: Plan, tick: Tick) -> Prompts:
    """The prompts as CLIP Text Encode encodes them."""
    found = list[Conditioning]()
    for text in (*plan.prompts, plan.negative):
        tick(0)
        found.append(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
    return found[:-1], found[-1]


def _sample(
    side: Side, prompts: Prompts, plan: Plan, tick: Tick, done: int
) -> Iterator[Float[Tensor, "b *d"]]:
    """A side's latents on the CPU, batch after batch."""
    import comfy.samplers
    from comfy.sample import fix_empty_latent_channels

    positives, negative = prompts
    width, height = plan.size
    empty = fix_empty_latent_channels(
        side.model, torch.zeros(1, 4, height // 8, width // 8), 8, None
    )
    for positive in positives:
        guider = side.guider() if side.guider else comfy.samplers.CFGGuider(side.model)
        guider.set_conds(positive, negative)
        guider.set_cfg(plan.cfg)
        for start in range(0, len(plan.seeds), plan.batch):
            seeds = plan.seeds[start : start + plan.batch]
            yield _batch(guider, empty, seeds, plan, _step_callback(tick, done, len(seeds)))
            done += len(seeds) * plan.steps


def _step_callback(tick: Tick, done: int, images: int) -> Callable[..., None]:
    """The sampler's callback after every step of a batch."""
    return lambda step, *_: tick(done + images * (step + 1))


def _batch(
    guider: Any,
    empty: Float[Tensor, "1 *d"],
    seeds: Sequence[int],
    plan: Plan,
    callback: Callable[..., None],
) -> Float[Tensor, "b *d"]:
    """One image per seed, from the noise that KSampler would give it in a batch of one."""
    import comfy.utils
    from comfy.sample import prepare_noise

    sampled = guider.sample(
        torch.cat([prepare_noise(empty, seed) for seed in seeds]),
        empty.repeat(len(seeds), *[1] * (empty.ndim - 1)),
        plan.sampler,
        plan.sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seeds[0],
    )
    return sampled.cpu()


def _decode(vae: Any, latents: Float[Tensor, "b *d"]) -> Float[Tensor, "b h w c"]:
    """Images of latents; of a video, its first picture."""
    images = vae.decode(latents).detach()
    return images[:, 0] if images.ndim == 5 else images

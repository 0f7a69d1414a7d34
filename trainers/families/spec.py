"""The facts of a model family that the rest of the program reads. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .header import Header
from .text.header import Kind

MARKS = ("v_pred", "ztsnr")
"""Empty tensors in a file: its network predicts v; its noise schedule ends in pure noise."""


UNET_LAYERS = r"(down|up)_blocks?[._]|(in|out)put_blocks"
JOINT_LAYERS = r"(?<!attentions[._]\d[._])transformer_blocks"
FLUX_LAYERS = (r"single_(transformer_)?blocks|double_blocks", JOINT_LAYERS)
"""Patterns of `FamilySpec.lora_layers` that several families have."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published model that presets name in `model.source`; users give their own copy of it.

    Attributes:
        title: what it is called.
        page: where to get it.
        licence: its name.
    """

    title: str
    page: str
    licence: str


@dataclass(frozen=True, slots=True)
class Demo:
    """A model that is shipped with the pack.

    Attributes:
        network: its entry in the table of costs.
        text: tokens of a prompt.
    """

    network: str
    text: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InComfyUI:
    """How ComfyUI loads a family; its classes by their names.

    Attributes:
        classes: of `comfy.supported_models`; none if its models are not handed over.
        clip: how the class of its CLIP begins.
        encoders: text encoders that it may have; the last one's tokens are what the network attends
            to.
        is_joined: whether the tokens of all encoders stand side by side instead.
        clip_alone: whether a small network may attend to CLIP-L's own tokens.
        clip_skip: whether "CLIP Set Last Layer" may choose another layer of the text encoder.
        text_width: where `unet_config` has the width of the prompt's tokens.
        states: hidden states of the encoder that stand side by side in a token.
        vaes: classes of the autoencoders that fit.
        vae_file: the name of the published one's file, if it has one of its own.
        loader: how to load a CLIP that fits, for messages.
        time: what the network is told at sigma 1 (flow models).
        sampling: the node that sets the shift (flow models).
        has_shift: whether models are trained at the shift that it gives them where no node does;
            else at the one that they were published with.
        relatives: entries of `unet_config` that only relatives have, and what those are.
        judge: refuses, with `ModelError`, a `unet_config` of a relative that is told otherwise.
        renamed: ends of names in the network that ComfyUI changes when it loads a file, and what
            they were.
        heeds_marks: whether it heeds `MARKS` in a file.
    """

    classes: tuple[str, ...]
    clip: str
    encoders: tuple[Kind, ...]
    is_joined: bool = False
    clip_alone: bool = False
    clip_skip: bool = False
    text_width: tuple[str, ...]
    states: int = 1
    vaes: tuple[str, ...]
    vae_file: str = ""
    loader: str
    time: float = 1000.0
    sampling: str = ""
    has_shift: bool = False
    relatives: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[Mapping[str, Any]], None] = lambda config: None
    renamed: tuple[tuple[str, str], ...] = ()
    heeds_marks: bool = False

    def marks(self, prediction_type: str, *, ends_in_noise: bool) -> tuple[str, ...]:
        """Those of `MARKS` by which it knows a network; none where it heeds or needs none.

        Args:
            prediction_type: what the network predicts.
            ends_in_noise: whether its noise schedule ends in pure noise.
        """
        if not self.heeds_marks or prediction_type != "v_prediction":
            return ()
        return MARKS if ends_in_noise else MARKS[:1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """One family of models. `families/NAME/` has the rest: `spec.part("model")` loads them.

    A family's package has

    - `model`: `load_folder` and `load_files`, which make its `Family`;
    - `costs`: COUNTABLE, how its networks are made and called to be counted;
    - `file`: `original_layers`, if `has_original_names`.

    Attributes:
        name: in configs and job files.
        package: its folder, as `__package__` says it.
        title: what users call it.
        models: the models that it takes, for messages.
        is_flow: whether its networks predict a velocity; else noise, v or the clean image.
        is_large: whether it needs what saves memory on a common card.
        options: fields of the config's section `model` that only some families take.
        settings: those of them that are attributes of its `Family`.

        takes: whether a checkpoint's header is of this family, usable or not.
        judge: refuses a header that is unusable, naming what it is and what to do.
        judge_parts: refuses headers of network, text encoders and autoencoder that do not belong
            together; None if all are in one file.
        takes_config: whether the network's config in a diffusers folder is of this family.
        judge_config: refuses a config that is unusable; its second argument names the model.
        is_distilled: whether a file or folder is distilled to a few steps, as far as its name says;
            it is evaluated, and trained only if `model.train_distilled` is set.
        folders: of a diffusers folder, those that must be there, the network's first.

        network: the published network's entry in the table of costs.
        checkpoints: published models, by their names in `model.source`.
        demos: shipped models, likewise.

        class_name: of the network in diffusers.
        blocks: classes that a network repeats.
        packed: beginnings of the paths of blocks whose linear layers `model.base` packs.
        channels: of a latent.
        factor: pixels along the side of one latent point.
        multiple: pixels that the sides of an image are multiples of, 1 if only the autoencoder
            says.
        least: px; a square of this side is the smallest image that published models draw well.
        doubtful_optimizers: kinds of `optimizer.kind` that were reported to fail on it.
        text: tokens of a prompt that the network attends to.
        encoders: weights of the text encoders that run in float32, and of those that run in the
            network's precision.

        steps: of its usual sampler.
        transition: likewise.
        grid: of sigmas (flow models).

        lora_targets: ends of module names that get adapters if the config names none.
        lora_base: the base's name in LoRA managers.
        lora_architecture: the same in ModelSpec's metadata.
        lora_notes: further metadata of its LoRA files.
        lora_layers: patterns of names in LoRA files for it, the most telling first.
        relatives: well-known models of it, and the pattern that finds them in a file's name.
        is_kohya: whether LoRA files have kohya's names (`lora_unet_...`); else
            `transformer.<path>.lora_A`.
        lora_prefix: of the latter, if it is another.
        is_scale_folded: whether alpha / rank is part of B in a LoRA file, which then has no alpha.
        has_original_names: whether LoRA files may have the original layers' names.

        comfyui: how ComfyUI loads it.
    """

    name: str
    package: str | None
    title: str
    models: str
    is_flow: bool
    is_large: bool
    options: frozenset[str]
    settings: tuple[str, ...] = ()

    takes: Callable[[Header], bool]
    judge: Callable[[Header], None]
    judge_parts: Callable[[Header, Sequence[Header], Header | None], None] | None
    takes_config: Callable[[Mapping[str, Any]], bool]
    judge_config: Callable[[Mapping[str, Any], str], None]
    is_distilled: Callable[[Path], bool] = lambda path: False
    folders: tuple[str, ...]

    network: str
    checkpoints: Mapping[str, Checkpoint]
    demos: Mapping[str, Demo] = field(default_factory=dict)

    class_name: str
    blocks: tuple[str, ...]
    packed: tuple[str, ...] = ("transformer_blocks.", "single_transformer_blocks.")
    channels: int
    factor: int = 8
    multiple: int
    least: int = 0
    doubtful_optimizers: tuple[str, ...] = ()
    text: int
    encoders: tuple[int, int]

    steps: int
    transition: str
    grid: str = ""

    lora_targets: tuple[str, ...]
    lora_base: str
    lora_architecture: str
    lora_notes: Mapping[str, Any] = field(default_factory=dict)
    relatives: Mapping[str, str] = field(default_factory=dict)
    is_kohya: bool
    lora_prefix: str = "transformer."
    lora_layers: tuple[str, ...] = ()
    is_scale_folded: bool = False
    has_original_names: bool

    comfyui: InComfyUI

    def part(self, name: str) -> ModuleType:
        """A module of the family's package, imported now, as it may need torch."""
        return import_module(f".{name}", self.package)

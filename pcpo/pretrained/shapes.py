"""Names and shapes of all tensors in each weight file, computed from a few widths.

Names are those of transformers' modules. A file is recognised by this alone; its name only
separates files of equal shapes. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A transformer.

    Attributes:
        width: of its hidden states.
        heads: of its attention.
        inner: width between the two maps of its perceptrons.
    """

    width: int
    layers: int
    heads: int
    inner: int


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """A CLIP: two towers with an embedding in common.

    Attributes:
        vision: the images' tower.
        text: the prompts' tower.
        patch: side of a patch in pixels.
        size: side of the images in pixels.
        embed: width of the common embedding.
        activation: of both towers' perceptrons. OpenAI trained with `quick_gelu`, open_clip with
            `gelu`.
        vocabulary: number of tokens.
        context: most tokens of a prompt.
    """

    vision: TowerSpec
    text: TowerSpec
    patch: int
    size: int
    embed: int
    activation: Literal["gelu", "quick_gelu"]
    vocabulary: int = 49408
    context: int = 77


@dataclass(frozen=True, slots=True)
class BlipSpec:
    """A BLIP whose text encoder attends to the image.

    Attributes:
        vision: the images' tower.
        text: the prompts' encoder.
        patch: side of a patch in pixels.
        size: side of the images in pixels.
        vocabulary: number of tokens; two more than BERT's.
        context: most tokens the encoder has positions for.
    """

    vision: TowerSpec
    text: TowerSpec
    patch: int
    size: int
    vocabulary: int
    context: int = 512


@dataclass(frozen=True, slots=True)
class SiglipSpec:
    """The images' tower of a SigLIP.

    Attributes:
        vision: the tower.
        patch: side of a patch in pixels.
        size: side of the images in pixels.
    """

    vision: TowerSpec
    patch: int
    size: int


_L14 = ClipSpec(
    vision=TowerSpec(1024, 24, 16, 4096),
    text=TowerSpec(768, 12, 12, 3072),
    patch=14,
    size=224,
    embed=768,
    activation="quick_gelu",
)
_B32 = ClipSpec(
    vision=TowerSpec(768, 12, 12, 3072),
    text=TowerSpec(512, 12, 8, 2048),
    patch=32,
    size=224,
    embed=512,
    activation="quick_gelu",
)
_H14 = ClipSpec(
    vision=TowerSpec(1280, 32, 16, 5120),
    text=TowerSpec(1024, 24, 16, 4096),
    patch=14,
    size=224,
    embed=1024,
    activation="gelu",
)

CLIPS: dict[str, ClipSpec] = {
    "clip_l_vision": _L14,
    "clip_l": _L14,
    "clip_b32": _B32,
    "pick_score": _H14,
    "hps_v2": _H14,
    "hps_v2_1": _H14,
}

BLIPS: dict[str, BlipSpec] = {
    "image_reward": BlipSpec(
        vision=TowerSpec(1024, 24, 16, 4096),
        text=TowerSpec(768, 12, 12, 3072),
        patch=16,
        size=224,
        vocabulary=30524,
    )
}

SIGLIPS: dict[str, SiglipSpec] = {
    "siglip": SiglipSpec(vision=TowerSpec(1152, 27, 16, 4304), patch=14, size=384)
}

HEAD = (1024, 128, 64, 16, 1)
"""Widths after each linear map of an aesthetic head, LAION's and ImageReward's alike."""

HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Their indices in the file's sequence; dropouts are between them, and no activation."""


def _linear(name: str, wide: int, narrow: int) -> Shapes:
    return {f"{name}.weight": (wide, narrow), f"{name}.bias": (wide,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def head_shapes(width: int) -> Shapes:
    """Shapes of an aesthetic head over embeddings of a width."""
    shapes: Shapes = {}
    for layer, wide, narrow in zip(HEAD_LAYERS, HEAD, (width, *HEAD[:-1]), strict=True):
        shapes |= _linear(f"layers.{layer}", wide, narrow)
    return shapes


def _clip_layers(prefix: str, tower: TowerSpec) -> Shapes:
    shapes: Shapes = {}
    for i in range(tower.layers):
        layer = f"{prefix}.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", tower.width, tower.width)
        shapes |= _norm(f"{layer}.layer_norm1", tower.width)
        shapes |= _linear(f"{layer}.mlp.fc1", tower.inner, tower.width)
        shapes |= _linear(f"{layer}.mlp.fc2", tower.width, tower.inner)
        shapes |= _norm(f"{layer}.layer_norm2", tower.width)
    return shapes


def vision_shapes(spec: ClipSpec) -> Shapes:
    """Shapes of a CLIP's vision tower with its projection."""
    tower, places = spec.vision, (spec.size // spec.patch) ** 2 + 1
    return {
        "vision_model.embeddings.class_embedding": (tower.width,),
        "vision_model.embeddings.patch_embedding.weight": (
            *(tower.width, 3),
            *(spec.patch, spec.patch),
        ),
        "vision_model.embeddings.position_embedding.weight": (places, tower.width),
        **_norm("vision_model.pre_layrnorm", tower.width),
        **_clip_layers("vision_model", tower),
        **_norm("vision_model.post_layernorm", tower.width),
        "visual_projection.weight": (spec.embed, tower.width),
    }


def siglip_shapes(spec: SiglipSpec) -> Shapes:
    """Shapes of a SigLIP's vision tower with the attention that pools its tokens."""
    tower, head = spec.vision, "vision_model.head"
    places = "vision_model.embeddings"
    return {
        f"{places}.patch_embedding.weight": (tower.width, 3, spec.patch, spec.patch),
        f"{places}.patch_embedding.bias": (tower.width,),
        f"{places}.position_embedding.weight": ((spec.size // spec.patch) ** 2, tower.width),
        **_clip_layers("vision_model", tower),
        **_norm("vision_model.post_layernorm", tower.width),
        f"{head}.probe": (1, 1, tower.width),
        f"{head}.attention.in_proj_weight": (3 * tower.width, tower.width),
        f"{head}.attention.in_proj_bias": (3 * tower.width,),
        **_linear(f"{head}.attention.out_proj", tower.width, tower.width),
        **_norm(f"{head}.layernorm", tower.width),
        **_linear(f"{head}.mlp.fc1", tower.inner, tower.width),
        **_linear(f"{head}.mlp.fc2", tower.width, tower.inner),
    }


def text_shapes(spec: ClipSpec) -> Shapes:
    """Shapes of a CLIP's text tower with its projection."""
    tower = spec.text
    return {
        "text_model.embeddings.token_embedding.weight": (spec.vocabulary, tower.width),
        "text_model.embeddings.position_embedding.weight": (spec.context, tower.width),
        **_clip_layers("text_model", tower),
        **_norm("text_model.final_layer_norm", tower.width),
        "text_projection.weight": (spec.embed, tower.width),
    }


def clip_shapes(spec: ClipSpec) -> Shapes:
    return {"logit_scale": (), **vision_shapes(spec), **text_shapes(spec)}


def blip_vision_shapes(spec: BlipSpec) -> Shapes:
    """Shapes of a BLIP's vision tower, `vision.` before each name."""
    tower, places = spec.vision, (spec.size // spec.patch) ** 2 + 1
    shapes: Shapes = {
        "vision.embeddings.class_embedding": (1, 1, tower.width),
        "vision.embeddings.position_embedding": (1, places, tower.width),
        "vision.embeddings.patch_embedding.weight": (tower.width, 3, spec.patch, spec.patch),
        "vision.embeddings.patch_embedding.bias": (tower.width,),
    }
    for i in range(tower.layers):
        layer = f"vision.encoder.layers.{i}"
        shapes |= _linear(f"{layer}.self_attn.qkv", 3 * tower.width, tower.width)
        shapes |= _linear(f"{layer}.self_attn.projection", tower.width, tower.width)
        shapes |= _norm(f"{layer}.layer_norm1", tower.width)
        shapes |= _linear(f"{layer}.mlp.fc1", tower.inner, tower.width)
        shapes |= _linear(f"{layer}.mlp.fc2", tower.width, tower.inner)
        shapes |= _norm(f"{layer}.layer_norm2", tower.width)
    return shapes | _norm("vision.post_layernorm", tower.width)


def blip_text_shapes(spec: BlipSpec) -> Shapes:
    """Shapes of a BLIP's text encoder, `text.` before each name."""
    tower, context = spec.text, spec.vision.width
    shapes: Shapes = {
        "text.embeddings.word_embeddings.weight": (spec.vocabulary, tower.width),
        "text.embeddings.position_embeddings.weight": (spec.context, tower.width),
        **_norm("text.embeddings.LayerNorm", tower.width),
    }
    for i in range(tower.layers):
        layer = f"text.encoder.layer.{i}"
        for attention, seen in (("attention", tower.width), ("crossattention", context)):
            shapes |= _linear(f"{layer}.{attention}.self.query", tower.width, tower.width)
            shapes |= _linear(f"{layer}.{attention}.self.key", tower.width, seen)
            shapes |= _linear(f"{layer}.{attention}.self.value", tower.width, seen)
            shapes |= _linear(f"{layer}.{attention}.output.dense", tower.width, tower.width)
            shapes |= _norm(f"{layer}.{attention}.output.LayerNorm", tower.width)
        shapes |= _linear(f"{layer}.intermediate.dense", tower.inner, tower.width)
        shapes |= _linear(f"{layer}.output.dense", tower.width, tower.inner)
        shapes |= _norm(f"{layer}.output.LayerNorm", tower.width)
    return shapes


def blip_shapes(spec: BlipSpec) -> Shapes:
    """Shapes of a BLIP with its aesthetic head."""
    head = {f"head.{key}": shape for key, shape in head_shapes(spec.text.width).items()}
    return {**blip_vision_shapes(spec), **blip_text_shapes(spec), **head}

"""The names of one network in different files, as pieces of the tensors named in `shapes`.

CLIP is stored as transformers has it ("vision_model...") or as OpenAI and open_clip have it
("visual..."); ImageReward as BLIP's authors had it; DINOv2 as its authors, or as transformers had
it before version 5. Each name in a file gives one piece, three if queries, keys and values lie
in one tensor, or is on the list of names to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .shapes import Shapes


@dataclass(frozen=True, slots=True)
class Piece:
    """The place of a tensor in a file.

    Attributes:
        source: the name there.
        third: which third of its rows; all of it if None.
        turned: whether it is stored as its transpose.
    """

    source: str
    third: int | None = None
    turned: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The piece's shape if its source has the shape `stored`."""
        if self.third is not None:
            return (stored[0] // 3, *stored[1:])
        return stored[::-1] if self.turned else stored

    def take(self, tensor: Tensor) -> Tensor:
        """Cut the piece out of its source."""
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return tensor.T if self.turned else tensor


Pieces = dict[str, Piece]

_Rule = tuple[str, str]  # pattern of a file's name, name here

_HF_DROPS = r"(vision_model|text_model)\.embeddings\.position_ids"
_OPEN_CLIP_DROPS = r"attn_mask|input_resolution|context_length|vocab_size"
_BLIP_DROPS = (
    r"blip\.text_encoder\.embeddings\.position_ids|blip\.(vision|text)_proj\.(weight|bias)"
)

_SIGLIP_DROPS = rf"{_HF_DROPS}|text_model\..+|logit_(scale|bias)"
_DINO_DROPS = r"(embeddings\.)?mask_token"
_CLASSIFIER_DROPS = r"classifier\..+"
_NORM_DROPS = r".+\.num_batches_tracked"

_OPEN_CLIP: tuple[_Rule, ...] = (
    (r"logit_scale", "logit_scale"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
)
_OPEN_CLIP_LAYER: tuple[_Rule, ...] = (
    (r"ln_([12])\.(\w+)", r"layer_norm\1.\2"),
    (r"attn\.in_proj_(\w+)", r"self_attn.{}_proj.\1"),
    (r"attn\.out_proj\.(\w+)", r"self_attn.out_proj.\1"),
    (r"mlp\.c_fc\.(\w+)", r"mlp.fc1.\1"),
    (r"mlp\.c_proj\.(\w+)", r"mlp.fc2.\1"),
)
_TURNED = ("visual.proj", "text_projection")

_BLIP: tuple[_Rule, ...] = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(\w+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(\w+)", r"vision.post_layernorm.\1"),
    (r"blip\.text_encoder\.((?:embeddings|encoder)\..+)", r"text.\1"),
    (r"mlp\.(layers\.\d+\.\w+)", r"head.\1"),
)
_BLIP_LAYER: tuple[_Rule, ...] = (
    (r"norm([12])\.(\w+)", r"layer_norm\1.\2"),
    (r"attn\.qkv\.(\w+)", r"self_attn.qkv.\1"),
    (r"attn\.proj\.(\w+)", r"self_attn.projection.\1"),
    (r"mlp\.(fc[12]\.\w+)", r"mlp.\1"),
)

_DINO: tuple[_Rule, ...] = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(\w+)", r"layernorm.\1"),
)
_DINO_LAYER: tuple[_Rule, ...] = (
    (r"(norm[12])\.(\w+)", r"\1.\2"),
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
    (r"(mlp\.fc[12])\.(\w+)", r"\1.\2"),
    (r"attn\.qkv\.(\w+)", r"attention.{}_proj.\1"),
    (r"attn\.proj\.(\w+)", r"attention.o_proj.\1"),
)
_HF_DINO_LAYER: tuple[_Rule, ...] = (  # before transformers 5
    (r"attention\.attention\.(q|k|v)\w+\.(\w+)", r"attention.\1_proj.\2"),
    (r"attention\.output\.dense\.(\w+)", r"attention.o_proj.\1"),
)


def _rename(name: str, rules: Iterable[_Rule]) -> str | None:
    for pattern, ours in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return None


def _open_clip(name: str) -> Pieces:
    """The pieces of one tensor in the layout of OpenAI and open_clip, if it has any."""
    layer = re.fullmatch(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+)", name)
    if layer is None:
        ours = _rename(name, _OPEN_CLIP)
        return {ours: Piece(name, turned=name in _TURNED)} if ours else {}
    ours = _rename(layer[3], _OPEN_CLIP_LAYER)
    if ours is None:
        return {}
    tower = "vision_model" if layer[1] else "text_model"
    ours = f"{tower}.encoder.layers.{layer[2]}.{ours}"
    if "{}" not in ours:
        return {ours: Piece(name)}
    return {ours.format(part): Piece(name, third=i) for i, part in enumerate("qkv")}


def _blip(name: str) -> Pieces:
    """The pieces of one tensor of ImageReward, if it has any."""
    layer = re.fullmatch(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)", name)
    if layer is None:
        ours = _rename(name, _BLIP)
    elif ours := _rename(layer[2], _BLIP_LAYER):
        ours = f"vision.encoder.layers.{layer[1]}.{ours}"
    return {ours: Piece(name)} if ours else {}


def _dino(name: str) -> Pieces:
    """The pieces of one tensor of a DINOv2 in its authors' layout, if it has any."""
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if layer is None:
        ours = _rename(name, _DINO)
        return {ours: Piece(name)} if ours else {}
    ours = _rename(layer[2], _DINO_LAYER)
    if ours is None:
        return {}
    ours = f"encoder.layer.{layer[1]}.{ours}"
    if "{}" not in ours:
        return {ours: Piece(name)}
    return {ours.format(part): Piece(name, third=i) for i, part in enumerate("qkv")}


def _hf_dino(name: str) -> Pieces:
    """The piece of one tensor of a DINOv2 of transformers, if its name differs from ours."""
    layer = re.fullmatch(r"(encoder\.layer\.\d+\.)(.+)", name)
    ours = _rename(layer[2], _HF_DINO_LAYER) if layer else None
    return {f"{layer[1]}{ours}": Piece(name)} if layer and ours else {}


def _itself(name: str) -> Pieces:
    return {name: Piece(name)}


def pieces_of(names: Iterable[str]) -> Pieces:
    """All pieces of a file, by their names here.

    A name that no layout knows is kept, so that it can be reported.

    >>> found = pieces_of(["visual.proj", "transformer.resblocks.3.attn.in_proj_bias"])
    >>> sorted(found)[1:3]
    ['text_model.encoder.layers.3.self_attn.q_proj.bias', \
'text_model.encoder.layers.3.self_attn.v_proj.bias']
    >>> found["visual_projection.weight"]
    Piece(source='visual.proj', third=None, turned=True)
    """
    names = list(names)
    read, drops = _layout_of(names)
    kept = [name for name in names if not re.fullmatch(drops, name)]
    return {ours: piece for name in kept for ours, piece in (read(name) or _itself(name)).items()}


def _layout_of(names: Collection[str]) -> tuple[Callable[[str], Pieces], str]:
    """How to read a file's names, and the pattern of those to leave out."""
    if any(name.startswith("visual.") for name in names):
        return _open_clip, _OPEN_CLIP_DROPS
    if any(name.startswith("blip.") for name in names):
        return _blip, _BLIP_DROPS
    if "blocks.0.ls1.gamma" in names:
        return _dino, _DINO_DROPS
    if "encoder.layer.0.layer_scale1.lambda1" in names:
        return _hf_dino, _DINO_DROPS
    if "vision_model.head.probe" in names:
        return _itself, _SIGLIP_DROPS
    if "features.0.weight" in names:
        return _itself, _CLASSIFIER_DROPS
    if any(name.endswith(".bn.running_mean") for name in names):
        return _itself, _NORM_DROPS
    return _itself, _HF_DROPS


def piece_shapes(stored: Shapes) -> Shapes:
    """Shapes of a file's pieces by their names here, from names and shapes in the file."""
    pieces = pieces_of(stored)
    return {ours: piece.shape(stored[piece.source]) for ours, piece in pieces.items()}


def network_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by their names here; views of them."""
    return {ours: piece.take(tensors[piece.source]) for ours, piece in pieces_of(tensors).items()}

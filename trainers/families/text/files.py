"""Text encoders from the tensors of files or folders.

Tensors in any layout (transformers', ComfyUI's, OpenCLIP's) are renamed to transformers' and become
its modules; sizes are read from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .. import architecture
from ..assemble import assemble
from ..errors import ModelError
from ..source import read_config, weight_variant
from ..weights import Weights, open_weights
from .encoders import T5, Clip
from .header import TITLES, Kind, encoders_of_file, find_encoders

_ACTIVATION = {"clip_l": "quick_gelu", "clip_g": "gelu"}
_CLIP_CLASS: Any = CLIPTextModelWithProjection  # transformers' decorators hide its signature

# --- where the tensors are -----------------------------------------------------------------------


def encoders_in(
    checkpoint: Weights, given: Sequence[Weights] = ()
) -> dict[Kind, tuple[Weights, str]]:
    """By kind, the file that holds a text encoder and the prefix of its tensors.

    Given files, in any order, come before the checkpoint.

    Raises:
        ModelError: if two given files hold the same encoder, or one holds none.
    """
    given_encoders: dict[Kind, tuple[Weights, str]] = {}
    for weights in given:
        for kind, prefix in encoders_of_file(weights.header).items():
            if kind in given_encoders:
                raise ModelError(
                    f"{given_encoders[kind][0].header.name} and {weights.header.name} both hold "
                    f"{TITLES[kind]}: give one of them"
                )
            given_encoders[kind] = (weights, prefix)
    own: dict[Kind, tuple[Weights, str]] = {
        kind: (checkpoint, prefix) for kind, prefix in find_encoders(checkpoint.header).items()
    }
    return own | given_encoders


def part_tensors(
    part: Path,
    dtype: torch.dtype | None = None,
    *,
    is_outline: bool = False,
    wanted: Callable[[str], bool] = bool,
) -> dict[str, Tensor]:
    """The tensors of one module's folder, from all its shards.

    Args:
        dtype: of all tensors; as stored if None.
        is_outline: their shapes alone, on torch's "meta" device.
        wanted: whether to read a tensor, by its name.
    """
    variant = weight_variant(part)
    files = [f for f in sorted(part.glob("*.safetensors")) if (".fp16" in f.name) == bool(variant)]
    opened = [open_weights(file).select(wanted) for file in files]
    read = [weights.outline() if is_outline else weights for weights in opened]
    return {key: t for weights in read for key, t in weights.under("", dtype).items()}


# --- CLIP ----------------------------------------------------------------------------------------

_OPEN_CLIP = (
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"text_model.encoder.layers.\1."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
_FUSED = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")
_TOP = ("embeddings.", "encoder.", "final_layer_norm.")  # without transformers' "text_model."
_NOT_TEXT = ("vision_model.", "visual.", "visual_projection.", "scaled_fp8")
_NO_WEIGHTS = ("position_ids", "logit_scale", "attn_mask")


def clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename CLIP's text tensors, without a prefix, to transformers' names.

    They come in CLIP's own, OpenCLIP's or ComfyUI's layout; a fused projection of queries, keys and
    values is split.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(_NO_WEIGHTS) or key.startswith(_NOT_TEXT):
            continue
        if key == "text_projection":  # OpenCLIP's is not a linear layer's weight, but its transpose
            out["text_projection.weight"] = tensor.T.contiguous()
        elif fused := _FUSED.fullmatch(key):
            layer = fused[1].replace("transformer.resblocks", "text_model.encoder.layers")
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{layer}.self_attn.{name}_proj.{fused[2]}"] = part
        else:
            name = f"text_model.{key}" if key.startswith(_TOP) else key
            for pattern, ours in _OPEN_CLIP:
                name = re.sub(pattern, ours, name)
            out[name] = tensor
    return out


def load_clip(
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    kind: Kind,
    what: str,
    *,
    is_projected: bool,
    config: Mapping[str, Any] | None = None,
) -> Clip:
    """A frozen CLIP text encoder from its tensors.

    Args:
        tensors: named without a prefix, in any layout; used as they are, not copied.
        kind: "clip_l" or "clip_g".
        what: for messages ("the text encoder in clip_l.safetensors").
        is_projected: whether to project the pooled vector.
        config: of a folder; read from the shapes if None.

    Raises:
        ModelError: if a tensor is missing or does not belong to it.
    """
    named = clip_names(tensors)
    hidden = named.get("text_model.final_layer_norm.weight")
    if hidden is not None and "text_projection.weight" not in named:
        if is_projected:
            raise ModelError(f"{what} lacks text_projection: the file is incomplete")
        named["text_projection.weight"] = torch.eye(len(hidden), dtype=hidden.dtype)
    read = dict(config) if config is not None else _clip_config(named, kind)
    if "text_projection.weight" in named:
        read["projection_dim"] = len(named["text_projection.weight"])
    model: Any = assemble(lambda: _CLIP_CLASS(CLIPTextConfig(**read)), named, what)
    embeddings = model.text_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]  # was on meta
    return Clip(model, tokenizer, TITLES[kind], is_projected)


def _clip_config(named: Mapping[str, Tensor], kind: Kind) -> dict[str, Any]:
    shapes = {key.removeprefix("text_model."): tuple(t.shape) for key, t in named.items()}
    read = architecture.text_config(shapes)
    return read | {"hidden_act": _ACTIVATION[kind], "eos_token_id": 49407, "bos_token_id": 49406}


# --- T5 ------------------------------------------------------------------------------------------

_BLOCK = "encoder.block.0.layer"


def load_t5(tensors: Mapping[str, Tensor], tokenizer: Any, what: str) -> T5:
    """The frozen encoder of a T5 1.1 from its tensors; a decoder beside it is left out.

    The tensors are named without a prefix, and not copied. `what` names the encoder in messages
    ("the text encoder in t5xxl.safetensors").

    Raises:
        ModelError: if a tensor is missing or does not belong to it.
    """
    named = {k: t for k, t in tensors.items() if k.startswith("encoder.")}
    # one table under two names, and files have either or both
    table = tensors.get("shared.weight", named.get("encoder.embed_tokens.weight"))
    if table is None:
        raise ModelError(f"{what} lacks shared.weight: the file is incomplete")
    named |= {"shared.weight": table, "encoder.embed_tokens.weight": table}
    for key, tensor in named.items():
        if key.endswith(".wo.weight") and tensor.dtype == torch.float16:
            named[key] = tensor.float()  # its results leave float16's range
    read = _t5_config({key: tuple(tensor.shape) for key, tensor in named.items()}, what)
    model = assemble(lambda: T5EncoderModel(T5Config(**read)), named, what)
    model.set_input_embeddings(model.shared)  # one table again
    return T5(model, tokenizer)


def _t5_config(shapes: architecture.Shapes, what: str) -> dict[str, Any]:
    try:
        vocabulary, hidden = shapes["shared.weight"]
        inner = shapes[f"{_BLOCK}.0.SelfAttention.q.weight"][0]
        buckets, heads = shapes[f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight"]
        feed_forward = shapes[f"{_BLOCK}.1.DenseReluDense.wi_0.weight"][0]
    except KeyError as error:
        raise ModelError(f"{what} lacks {error}: it is no T5 of version 1.1") from error
    layers = {m[1] for key in shapes if (m := re.match(r"encoder\.block\.(\d+)\.", key))}
    return {
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": inner // heads,
        "d_ff": feed_forward,
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


# --- from a folder -------------------------------------------------------------------------------


def clip_from_folder(part: Path, tokenizer: Any, kind: Kind, dtype: torch.dtype) -> Clip:
    """A frozen CLIP text encoder from its folder; its pooled vector is projected if the config says
    so.
    """
    config = read_config(part / "config.json")
    tensors = part_tensors(part, dtype)
    what = f"the text encoder in {part}"
    is_projected = "text_projection.weight" in tensors
    return load_clip(tensors, tokenizer, kind, what, is_projected=is_projected, config=config)

"""The state of a loaded part: how its weights are stored, and what nodes have put on it.

ComfyUI's classes are told by their names, so that nothing of ComfyUI is imported.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import NodeError

SCALED_FP8 = "FP8"
"""In the name of a layout of quantised weights that are numbers with one factor."""
QUANTISED_TYPES = {"GGMLTensor": "GGUF", "Params4bit": "NF4", "Int8Params": "int8"}
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}

HARMLESS_OBJECTS = {"model_sampling", "manual_cast_dtype"}
HARMLESS_OPTIONS = {"transformer_options", "disable_cfg1_optimization"}
HARMLESS_TRANSFORMER = {"optimized_attention_override"}
HARMLESS_WRAPPERS = {"torch.compile"}

# --- weights -------------------------------------------------------------------------------------


def layout_of(weight: Any) -> str | None:
    """How a weight is coded, where it is one of ComfyUI's quantised ones."""
    return getattr(weight, "_layout_cls", None)


def weights_note(name: str, module: torch.nn.Module) -> str | None:
    """What is done with weights that are no plain floating-point numbers.

    Returns:
        One sentence, or None where there are none such; `NodeError` where nothing can be done.
    """
    found = set()
    for key, weight in module.named_parameters():
        layout, kind = layout_of(weight), type(weight).__name__
        if layout is not None and SCALED_FP8 in layout.upper():
            found.add("scaled")
        elif layout is not None or kind in QUANTISED_TYPES:
            _refuse_dtype(name, QUANTISED_TYPES.get(kind, layout or kind))
        elif weight.dtype in FP8:
            found.add("plain")
        elif weight.dtype not in FLOATS and key.endswith("weight"):
            _refuse_dtype(name, str(weight.dtype).removeprefix("torch."))
    if "scaled" in found:
        return f"the scaled fp8 weights of the {name} were dequantised for training"
    if found:
        return f"the fp8 weights of the {name} were turned into bfloat16 for training"
    return None


def _refuse_dtype(name: str, what: str) -> None:
    plain = what.removeprefix("TensorCore").removeprefix("TensorWise").removesuffix("Layout")
    raise NodeError(
        f"the {name} has {plain} weights, which cannot be trained; load the fp16, bf16 or fp8 file "
        "of the same model"
    )


# --- patches that are no weights -----------------------------------------------------------------


def patches_beyond_weights(patcher: Any) -> list[str]:
    """What nodes have put on a model that a checkpoint cannot hold."""
    options = patcher.model_options
    found = {key for key, value in options.items() if value and key not in HARMLESS_OPTIONS}
    inside = options.get("transformer_options", {})
    found |= {key for key, value in inside.items() if value and key not in HARMLESS_TRANSFORMER}
    found |= set(patcher.object_patches) - HARMLESS_OBJECTS
    found |= set(patcher.weight_wrapper_patches)
    for name in ("injections", "additional_models", "hook_patches"):
        found |= {str(key) for key, value in getattr(patcher, name).items() if value}
    for wrappers in patcher.wrappers.values():
        found |= {str(k) for k, v in wrappers.items() if v and k not in HARMLESS_WRAPPERS}
    return sorted(found)


def refuse_patches(name: str, patcher: Any) -> None:
    """Refuse a part that nodes have changed in a way that a checkpoint cannot hold."""
    if found := patches_beyond_weights(patcher):
        shown = ", ".join(found[:3])
        raise NodeError(
            f"the {name} is changed by a node in a way that no checkpoint can hold ({shown}); "
            f"connect the {name} from before that node"
        )

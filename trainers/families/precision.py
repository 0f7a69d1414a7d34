"""The number formats in which a model file may store its weights. No torch here.

Read: float32, float16, bfloat16, and float8 ("fp8"), plain or with one scale per weight, stored
beside it. All other formats are codes that only the program which made them can compute with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .errors import ModelError
from .header import Header

SCALES = (".scale_weight", ".weight_scale")  # times the stored fp8 numbers is the weight
NOTES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # no part of the weights
FP8 = ("F8_E4M3", "F8_E5M2")

_Test = Callable[[Header], bool]


def _ends(*suffixes: str) -> _Test:
    return lambda header: any(key.endswith(suffixes) for key in header.shapes)


def _has_codes(header: Header) -> bool:
    codes = ("U8", "I8", "I4", "U4", "F4")
    return any(k.endswith("weight") and d in codes for k, d in header.dtypes.items())


def _has_block_scales(header: Header) -> bool:
    return any(math.prod(s) != 1 for key, s in header.shapes.items() if key.endswith(SCALES))


# In this order: the first that holds names the format.
_REFUSED: tuple[tuple[str, _Test], ...] = (
    ("nvfp4", _ends(".weight_scale_2")),
    ("nf4 or fp4", lambda header: any(".quant_state." in k for k in header.shapes)),
    ("8-bit or 4-bit", _ends(".absmax", ".quant_map", ".SCB")),
    ("SVDQuant", _ends(".qweight", ".wscales")),
    ("int8 or 4-bit", _has_codes),
    ("block-scaled fp8", _has_block_scales),
)


def judge_precision(header: Header) -> None:
    """Refuse weights that are stored as codes, naming the format."""
    for name, matches in _REFUSED:
        if matches(header):
            raise ModelError(
                f"{header.name} holds {name} weights, which cannot be trained here: choose the "
                "bf16, fp16 or fp8 .safetensors of the same model"
            )


def fp8_note(header: Header) -> str | None:
    """A note on weights stored as fp8; None if there are none."""
    if not any(dtype in FP8 for dtype in header.dtypes.values()):
        return None
    kind = "scaled fp8" if _ends(*SCALES)(header) else "fp8"
    return f"{header.name} stores weights as {kind}: they are read as the numbers they stand for"

"""What the network of a single file predicts, and the schedule that follows from it."""

from __future__ import annotations

import logging
from typing import Any

from .errors import ModelError
from .header import Header
from .scheduler import PREDICTION_TYPES, ZERO_SNR
from .spec import MARKS, FamilySpec

log = logging.getLogger(__name__)

_NOTES = ("modelspec.prediction_type", "modelspec.predict_key")
_NOTED = {"epsilon": "epsilon", "v": "v_prediction"}


def prediction_of(
    header: Header, asked: str | None, zero_snr: bool | None, spec: FamilySpec
) -> dict[str, Any]:
    """Fields of the scheduler's config: what the network predicts, as asked or as the file says.

    Args:
        asked: replaces what the file says, and makes its schedule the usual one.
        zero_snr: whether the schedule ends in pure noise; as the file says if None.
        spec: of the family.
    """
    if asked is not None and asked not in PREDICTION_TYPES:
        raise ModelError(
            f"prediction_type is {asked!r}; it must be one of {', '.join(PREDICTION_TYPES)}"
        )
    marks = [mark for mark in MARKS if mark in header.shapes]
    noted = next((_NOTED[n] for key in _NOTES if (n := header.metadata.get(key)) in _NOTED), None)
    told = asked or noted or ("v_prediction" if "v_pred" in marks else "epsilon")
    marked = "ztsnr" in marks and told == "v_prediction" and asked is None
    ends_in_noise = marked if zero_snr is None else zero_snr
    if marks:
        schedule = " that ends in pure noise" if ends_in_noise else ""
        log.info(
            f"{header.name} is marked {' and '.join(marks)}, and is taken as a model of {told}"
            f"{schedule}{' because prediction_type says so' if asked else ''}"
            + (
                ""
                if spec.comfyui.heeds_marks
                else f"; ComfyUI does not heed these marks in {spec.title}: set the same with its "
                "ModelSamplingDiscrete node"
            )
        )
    return {"prediction_type": told, **(ZERO_SNR if ends_in_noise else {})}

"""The tensors of one model file: opened without its weights, then read part by part."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...pcpo.finite import first_not_finite
from ...pcpo.pretrained.pickled import load_pickled, reason, weights_in
from .errors import ModelError
from .header import SAFETENSORS, Header, judge_start, read_header
from .precision import NOTES, SCALES, fp8_note, judge_precision

log = logging.getLogger(__name__)

_DTYPES = {  # as safetensors names those that a judge of headers asks for
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A model file.

    Attributes:
        tensors: of a pickled file, which is read at once; None for safetensors.
    """

    header: Header
    path: Path
    tensors: Mapping[str, Tensor] | None = None

    def under(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors below a prefix, named without it, on the CPU; fp8 as the numbers it stands
        for.

        Scales and notes beside fp8 weights are left out. Tensors of a safetensors file that are
        stored in `dtype` are memory-mapped; writing to them does not change the file.

        Args:
            prefix: "" for all.
            dtype: of all of them; None leaves them as they are stored, and fp8 becomes float32.
        """
        keys = [key for key in self.header.shapes if key.startswith(prefix)]
        if self.tensors is not None:
            # a copy: pickled tensors may be views that overlap, which training would mix up
            stored = {key[len(prefix) :]: self.tensors[key].clone() for key in keys}
            return _plain(stored, dtype, self.header.name)
        with safe_open(self.path, framework="pt") as file:
            stored = {key[len(prefix) :]: file.get_tensor(key) for key in keys}
            return _plain(stored, dtype, self.header.name)

    def select(self, wanted: Callable[[str], bool]) -> Weights:
        """The same without the tensors whose names are not wanted, which are never read."""
        shapes = {key: shape for key, shape in self.header.shapes.items() if wanted(key)}
        return replace(self, header=replace(self.header, shapes=shapes))

    def outline(self) -> Weights:
        """The same names and shapes without the weights, on torch's "meta" device."""
        shapes = self.header.shapes.items()
        return replace(self, tensors={key: torch.empty(s, device="meta") for key, s in shapes})


def open_weights(path: Path) -> Weights:
    """Open a .safetensors file, or one that torch pickled; fp8 weights are logged.

    Weights are read when they are asked for; a pickle is read at once.
    """
    if path.suffix.lower() in SAFETENSORS:
        weights = Weights(read_header(path), path)
    else:
        judge_start(path)
        tensors = unpickle(path)
        weights = Weights(_header_of(path, tensors), path, tensors)
    judge_precision(weights.header)
    if note := fp8_note(weights.header):
        log.info(note)
    return weights


def header_of_pickle(path: Path) -> Header:
    """The header of a file that torch pickled, its weights left on the disk.

    A file of torch before 1.6 is read whole all the same. `ModelError` if it is no plain weights.
    """
    return _header_of(path, unpickle(path, "meta"))


def _header_of(path: Path, tensors: Mapping[str, Tensor]) -> Header:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {k: _DTYPES[t.dtype] for k, t in tensors.items() if t.dtype in _DTYPES}
    return Header(path.name, shapes, dtypes)


def unpickle(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file that torch pickled; no code in it is run, other objects are left out.

    `device` "meta" reads no weights. `ModelError` if the file holds more than plain weights, or is
    damaged.
    """
    is_mapped = device == "meta" and zipfile.is_zipfile(path)
    try:
        content = load_pickled(path, device, mapped=is_mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path.name} cannot be read safely as plain weights ({reason(error)}): get the "
            ".safetensors of the same model"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ModelError(
            f"{path.name} is damaged or no checkpoint ({reason(error)}): download it again, or get "
            "the .safetensors of the same model"
        ) from error
    weights = weights_in(content)
    named = weights.items() if isinstance(weights, dict) else ()
    return {key: value for key, value in named if isinstance(value, Tensor)}


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not finite: images would be black, and training would fail.

    This takes 0.1 s for 1 GB on a CPU, and no memory; 2.5 s for the 24 GB of FLUX. Tensors on
    torch's "meta" device count as finite; the error names the first tensor.
    """
    if (name := first_not_finite(tensors)) is not None:
        raise ModelError(
            f"{what} has numbers that are not finite (NaN or infinite), first in {name}: it is "
            "damaged, or what trained it has diverged; get it again, or choose another"
        )


def _plain(stored: Mapping[str, Tensor], dtype: torch.dtype | None, name: str) -> dict[str, Tensor]:
    check_finite(stored, name)
    scales = {}
    for suffix in SCALES:
        scale_of_layer = {
            k.removesuffix(suffix): t for k, t in stored.items() if k.endswith(suffix)
        }
        scales |= {f"{layer}.weight": scale for layer, scale in scale_of_layer.items()}
    out = {}
    for key, tensor in stored.items():
        if key.endswith((*SCALES, *NOTES)):
            continue
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            tensor = tensor.float()
        if key in scales:
            tensor = tensor.float() * scales[key].float()
        out[key] = tensor if dtype is None else tensor.to(dtype)
    return out

"""Read tensors from files, without ever running the code of a pickle.

A file is one `.safetensors`, one of torch's own, or a folder in Hugging Face's format, in one
piece or in several.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..errors import RewardUnavailable
from .pickled import load_pickled, reason, weights_in
from .shapes import Shapes

SAFETENSORS = (".safetensors", ".sft")
SUFFIXES = (*SAFETENSORS, ".pt", ".pth", ".bin", ".ckpt")

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")

Answer = TypeVar("Answer")

_SEEN: dict[tuple[str, str], tuple[Any, Any]] = {}


class BrokenWeights(RewardUnavailable):
    """A file that cannot be read; the text says why, and what to do."""


def remember(what: str, path: Path, make: Callable[[Path], Answer]) -> Answer:
    """The answer of `make` for a file, cached while its size and time of change stay.

    Args:
        what: names the question.
        path: the file or folder.
        make: computes the answer, which must not be changed.
    """
    stamp = [(p, s.st_size, s.st_mtime_ns) for p in files_of(path) for s in [p.stat()]]
    place = (what, str(path.absolute()))
    if place not in _SEEN or _SEEN[place][0] != stamp:
        _SEEN[place] = (stamp, make(path))
    return _SEEN[place][1]


def index_of(folder: Path) -> Path | None:
    """The index of a model in several files, if the folder has one."""
    return next((folder / name for name in _INDEXES if (folder / name).is_file()), None)


def files_of(path: Path) -> list[Path]:
    """The files of tensors at a path: at least one.

    Args:
        path: a file, or a folder in Hugging Face's format.

    Raises:
        BrokenWeights: if it is no such folder, or a file of it is missing.
    """
    if not path.is_dir():
        return [path]
    if index := index_of(path):
        names = sorted(set(_read_index(index).values()))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise BrokenWeights(
                    f"{path} has no file {name}, which its {index.name} lists; download it again"
                )
        return [path / name for name in names]
    for name in WHOLE:
        if (path / name).is_file():
            return [path / name]
    raise BrokenWeights(
        f"the folder {path} holds no {' or '.join(WHOLE)}; give the file of weights itself"
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenWeights(
            f"{index} is no index of a model ({error}); download it again"
        ) from error


def is_old_format(path: Path) -> bool:
    """Whether torch has to read the whole file before it can list its contents."""
    if path.suffix.lower() in SAFETENSORS or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def shapes_of(path: Path) -> Shapes:
    """Names and shapes in a file, read from its header if its format has one.

    Args:
        path: a file, or a folder in Hugging Face's format.
    """
    return remember("shapes", path, lambda p: {n: s for f in files_of(p) for n, s in _header(f)})


def _header(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    if file.suffix.lower() not in SAFETENSORS:
        return [(name, tuple(tensor.shape)) for name, tensor in _torch_file(file).items()]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return [(name, tuple(opened.get_slice(name).get_shape())) for name in names]
    except (SafetensorError, OSError) as error:
        raise BrokenWeights(_incomplete(file, "safetensors file", error)) from error


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory if its format allows it.

    They are views of the file: copy what you keep.

    Args:
        path: a file, or a folder in Hugging Face's format.
    """
    return {name: tensor for file in files_of(path) for name, tensor in _tensors(file).items()}


def _tensors(file: Path) -> Mapping[str, Tensor]:
    if file.suffix.lower() not in SAFETENSORS:
        return _torch_file(file)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BrokenWeights(_incomplete(file, "safetensors file", error)) from error


def _torch_file(file: Path) -> dict[str, Tensor]:
    """Read a file of torch's own, as data alone."""
    try:
        mapped = _is_torch_archive(file)
        held = load_pickled(file, mapped=mapped)
    except pickle.UnpicklingError as error:
        raise BrokenWeights(
            f"{file} is a pickle with code or foreign objects in it, which are never run "
            f"({reason(error)}); get the same weights as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        if "TorchScript" in str(error):
            raise BrokenWeights(
                f"{file} is a TorchScript program, which is never run; get the same weights as "
                ".safetensors"
            ) from error
        raise BrokenWeights(_incomplete(file, "file of torch's", error)) from error
    held = weights_in(held)
    if not isinstance(held, dict):
        raise BrokenWeights(f"{file} holds a {type(held).__name__}, no weights by name")
    return {str(k): v.detach() for k, v in held.items() if isinstance(v, Tensor)}


def _is_torch_archive(file: Path) -> bool:
    """Whether a file is of torch's present format; False for the old one."""
    with file.open("rb") as opened:
        start = opened.read(4)
    if start == b"PK\x03\x04" and zipfile.is_zipfile(file):
        return True
    if start[:1] == b"\x80":
        return False
    raise BrokenWeights(
        f"{file} is no complete file of torch's (its beginning or its end is not that of one); "
        "download it again"
    )


def _incomplete(file: Path, kind: str, why: object) -> str:
    told = " ".join(str(why).split())[:160]
    return f"{file} is no complete {kind} ({told}); download it again"


def sha256_of(path: Path) -> str:
    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    return remember("sha256", path, digest)

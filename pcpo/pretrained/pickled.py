"""Read torch's pickles as data alone: no code of a file is run, and none is imported for it.

torch's restricted unpickler refuses a file for any object in it that is not torch's own, such as
the callbacks and settings beside the weights in a checkpoint of Lightning. Here such objects are
left out: for each, the unpickler gets a class that does nothing.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

MOST = 16
"""How many times its own size a file may unpack to: torch compresses nothing."""


class _LeftOut:
    """Replaces an object of the file."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """An empty instance; a dictionary for dictionaries, since their entries follow."""
        return OrderedDict() if cls.__name__.lower().endswith("dict") else super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Ignore the state."""


def load_pickled(file: Path, device: str = "cpu", *, mapped: bool = False) -> Any:
    """Load a file of torch's; objects that are neither torch's nor plain data are left out.

    Args:
        file: the file.
        device: of its tensors; "meta" reads none.
        mapped: whether to map them into memory, which the format before torch 1.6 does not allow.

    Raises:
        pickle.UnpicklingError: if it holds what cannot be left out, or would grow in memory;
            a damaged file raises other errors of torch.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > MOST * file.stat().st_size:
            raise pickle.UnpicklingError(f"it holds {size} bytes, many times its own size")
    strangers = _strangers(file)
    if strangers:
        names = ", ".join(strangers[:3]) + (", ..." if strangers[3:] else "")
        log.info("%s holds objects that are left out: %s", file.name, names)
    with torch.serialization.safe_globals([_stand_in(name) for name in strangers]):
        return torch.load(file, map_location=device, weights_only=True, mmap=mapped)


def _strangers(file: Path) -> list[str]:
    """Names of the classes and functions in a file that torch's unpickler refuses."""
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)  # torch 2.6
    try:
        return sorted(find(file)) if find else []
    except Exception:  # no such file: `torch.load` says what it is
        return []


def _stand_in(name: str) -> type:
    module, _, own = name.rpartition(".")
    return type(own, (_LeftOut,), {"__module__": module})


def reason(error: Exception) -> str:
    """The reason at the end of an error of torch's unpickler, without its advice."""
    ends = (
        line.rpartition("WeightsUnpickler error: ")[2].strip() for line in str(error).split("\n")
    )
    said = [end for end in ends if end.strip(".") and "documentation of torch.load" not in end]
    return said[-1].split(". ")[0].removesuffix(".")[:160] if said else type(error).__name__


def weights_in(held: Any) -> Any:
    """The weights in an unpickled file, as in ComfyUI: "state_dict", or a table's only key."""
    if not isinstance(held, dict):
        return held
    if "state_dict" in held:
        return held["state_dict"]
    only = next(iter(held.values())) if len(held) == 1 else None
    return only if isinstance(only, dict) else held

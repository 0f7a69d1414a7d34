"""Find weights: in the folders given, the environment's, a reference's own, the hub's cache."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ...remedies import command
from ..errors import RewardUnavailable
from .catalogue import WEIGHTS, metrics_of, rewards_of
from .layouts import network_tensors
from .read import (
    SUFFIXES,
    WHOLE,
    BrokenWeights,
    index_of,
    is_old_format,
    remember,
    sha256_of,
    tensors_of,
)
from .recognise import kinds_of, mismatch, needs_name, owner

log = logging.getLogger(__name__)

VARIABLE = "PCPO_REWARDS"
"""Environment variable: the folder of reward weights."""

_DEPTH = 3  # folders below one that is searched
_OLD_FORMAT_LIMIT = 64 * 2**20  # bytes of a file that has to be read whole to be recognised


class MissingWeights(RewardUnavailable):
    """A weight file that cannot be found; the text says which, and where to get it.

    Attributes:
        key: of the catalogue; None where a path was given.
    """

    def __init__(self, text: str, key: str | None = None) -> None:
        super().__init__(text)
        self.key = key


class WrongWeights(RewardUnavailable):
    """A file with other contents than asked for; the text says why."""


def places(key: str, folders: Sequence[str | Path] = ()) -> list[Path]:
    """The folders that are searched before the hub's cache, in order.

    Args:
        key: of the catalogue.
        folders: those that come first; some may not exist.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if named := os.environ.get(VARIABLE):
        paths.append(Path(named).expanduser())
    return list(dict.fromkeys([*paths, *_own_places(key)]))


def _own_places(key: str) -> list[Path]:
    """Where the references themselves put a file."""
    if key == "image_reward":
        return [Path("~/.cache/ImageReward").expanduser()]
    if key.startswith("lpips_"):
        package = find_spec("lpips")
        return [Path(package.origin).parent] if package and package.origin else []
    if metrics_of(key):
        return [Path(torch.hub.get_dir()) / "checkpoints"]
    return []


def find(key: str, folders: Sequence[str | Path] = (), given: str | Path | None = None) -> Path:
    """Find a weight file, without loading any of it.

    Args:
        key: of the catalogue.
        folders: to search first.
        given: the file itself, or a folder that holds it; nothing else is searched then.

    Returns:
        The file, or its folder if it is one of several in Hugging Face's format.

    Raises:
        MissingWeights: if it is nowhere.
    """
    searched, notes = places(key, folders), list[str]()
    if given is not None:
        path = Path(os.path.expanduser(given))
        if not os.path.exists(path):
            raise MissingWeights(f"there is no {path}, the path given for {_title(key)}")
        if not path.is_dir() or _is_model(path):
            return _check_given(key, path)
        searched = [path]
    found = _best(key, [path for folder in searched for path in _candidates(key, folder)], notes)
    if found is None and given is None:
        found = _find_in_cache(key)
    if found is None:
        raise MissingWeights(_missing_message(key, searched, notes), key)
    return _answer(key, found)


def _title(key: str) -> str:
    file = WEIGHTS[key]
    return f"{file.name} ({file.what})"


def _is_model(folder: Path) -> bool:
    return index_of(folder) is not None or any((folder / name).is_file() for name in WHOLE)


def _answer(key: str, path: Path) -> Path:
    """DeBERTa's path is its folder, which holds its tokenizer too."""
    return path.parent if key == "deberta" and path.is_file() else path


def _check_given(key: str, path: Path) -> Path:
    """Return the given path if it holds what was asked for; else raise `WrongWeights`."""
    if why := mismatch(path, key):
        what = " and ".join(_title(kind) for kind in kinds_of(path)[:2])
        told = f"; it is {what}" if what else ""
        raise WrongWeights(f"{path} is not {_title(key)}: {why}{told}")
    named = owner(path, key)
    if named not in (None, key):
        log.warning("%s is taken for %s, as it was given, but is named like %s", path, key, named)
    return _answer(key, path)


def _candidates(key: str, folder: Path) -> Iterator[Path]:
    """Files of a folder with the right endings; links are followed."""
    suffixes = (".txt",) if key == "bert_vocab" else SUFFIXES
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root)
        if len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        folders.sort()
        if key != "bert_vocab" and index_of(here):
            yield here
        else:
            fitting = [here / name for name in sorted(names) if name.lower().endswith(suffixes)]
            yield from (path for path in fitting if path.is_file())  # a link may lead nowhere


def _best(key: str, candidates: Sequence[Path], notes: list[str]) -> Path | None:
    """The first candidate with a fitting name, else the only one that could be it.

    `notes` takes the reason why a likely file was skipped.
    """
    unnamed: dict[Path, Path] = {}  # a file may be there under several names
    for path in candidates:
        named, why = None, None
        try:
            named = owner(path, key)
            if is_old_format(path) and path.stat().st_size > _OLD_FORMAT_LIMIT and named != key:
                continue
            why = mismatch(path, key)
        except (BrokenWeights, OSError) as error:
            why = str(error)
        if why is None and named == key:
            return path
        if why is None and named is None:
            unnamed.setdefault(path.resolve(), path)
        elif why is not None and named == key:
            notes.append(f"{path} was passed over, as {why}")
    if len(unnamed) == 1 and not needs_name(key):
        return next(iter(unnamed.values()))
    if unnamed:
        several = ", ".join(map(str, [*unnamed.values()][:3]))
        notes.append(f"{several} could be it by shape: give the right one as a path")
    return None


def _find_in_cache(key: str) -> Path | None:
    """The file in the hub's cache, if its contents are right."""
    from huggingface_hub import try_to_load_from_cache

    file = WEIGHTS[key]
    names = dict.fromkeys([file.file, *(WHOLE if file.file in WHOLE else ())])
    for name in names:
        cached = try_to_load_from_cache(file.repo, name) if file.repo and name else None
        if isinstance(cached, str) and mismatch(Path(cached), key) is None:
            return Path(cached)
    return None


def _missing_message(key: str, searched: Sequence[Path], notes: Sequence[str]) -> str:
    file, rewards, metrics = WEIGHTS[key], rewards_of(key), metrics_of(key)
    name = (rewards or metrics or [key])[0]
    user = f"the {'reward' if rewards else 'metric'} {name!r} needs " if rewards or metrics else ""
    where = f"not in the Hugging Face cache, and {VARIABLE} names no folder to look in"
    if searched:
        where = f"neither in {', '.join(map(str, searched))} nor in the Hugging Face cache"
    noted = f" ({'; '.join(notes)})" if notes else ""
    return (
        f"{user}{_title(key)}, which is {where}{noted}; put it into models/{file.folder}, or run "
        f"{command('rewards', 'get', name)} ({file.size_told}, licence {file.licence_told}, "
        f"from {file.page})"
    )


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `find` gave, by the names of `shapes`.

    They are views of the file; copy what you keep. What no network reads is left out.
    """
    return network_tensors(tensors_of(path))


def part_of(path: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin with one of the prefixes; views of it."""
    return {name: tensor for name, tensor in load(path).items() if name.startswith(prefixes)}


def digest(path: Path, *prefixes: str) -> str:
    """SHA-256 of some tensors of a file: equal for equal weights, whatever the file.

    It covers names, types, shapes and numbers; for a vocabulary it is the file's own.

    Args:
        path: from `find`.
        prefixes: of the tensors' names; all if there are none.
    """
    if path.suffix == ".txt":
        return sha256_of(path)
    kept = prefixes or ("",)
    return remember(f"digest {kept}", path, lambda p: _digest(part_of(p, *kept)))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        numbers = tensor.contiguous().reshape(-1).view(torch.uint8)
        digest.update(numbers.numpy().data)
    return digest.hexdigest()

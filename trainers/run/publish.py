"""The LoRA of a run where ComfyUI's loaders look for it. No torch.

A file of another origin is never replaced: `published.json` in the job folder holds the checksums
of what this run wrote there, and of the next file before it is written, so that a kill leaves no
doubt.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..config.train_config import ConfigError, TrainConfig
from ..job.files import checksum, replace_file, write_json
from ..job.folder import JobFolder
from ..job.leftovers import sweep

RECORD = "published.json"


def check_publish(config: TrainConfig) -> None:
    """Refuse a new run that would overwrite a file."""
    target = config.run.publish
    if target is not None and os.path.exists(target):
        raise ConfigError(
            f"run.publish is {target!r}, which exists; choose another name, or remove that file"
        )


class Published:
    """Keeps the file of `run.publish` at the run's best or newest export.

    Args:
        target: the file; None to publish none.
        say: called with what is in the way, once.

    Attributes:
        note: what is in the way at present, one sentence.
    """

    def __init__(self, folder: JobFolder, target: str | None, say: Callable[[str], None]) -> None:
        self.folder, self.target, self.say = folder, target, say
        self.note: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        """Its fields of the status."""
        return {"message": self.note} if self.note else {}

    def update(self, export: Path | None) -> str:
        """Update the file to an export, if there is one yet; returns a sentence if that fails."""
        if self.target is None or export is None:
            return ""
        note = publish(self.folder, export, Path(self.target))
        if note and note != self.note:
            self.say(note)
        self.note = note
        return f"; {note}" if note else ""


def publish(folder: JobFolder, export: Path, target: Path) -> str | None:
    """Copy an export to `target`, completely or not at all; only a file of this run is replaced.

    Returns:
        None, or one sentence on why it is not there; the run goes on.
    """
    mine = folder.read(RECORD).get("checksums", [])
    try:
        now, fresh = checksum(target) if target.exists() else None, checksum(export)
        if now == fresh:
            return None
        if now is not None and now not in mine:
            return _not_mine(folder, target)
        write_json(folder.root / RECORD, {"file": str(target), "checksums": [now, fresh]})
        sweep(target.parent, target.name, is_deep=False)
        with replace_file(target, is_new=now is None) as copy:
            shutil.copyfile(export, copy)
    except OSError as error:
        if isinstance(error, FileExistsError) and target.exists():  # since it was looked for
            return _not_mine(folder, target)
        return f"{target} could not be written ({error.strerror or error}); {_place_of(folder)}"
    return None


def _not_mine(folder: JobFolder, target: Path) -> str:
    return f"{target} is not of this run and was left as it is; {_place_of(folder)}"


def _place_of(folder: JobFolder) -> str:
    return f"the LoRA is in {folder.lora}"

"""What a run depends on besides its config: its prompts, which it keeps, and its files.

training_prompts.json in the job folder has the prompts that the run began with, so that it resumes
to the same bytes whatever happens to the file they are from. Files that are too large to keep are
identified by fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.train_config import ConfigError, TrainConfig
from ..families.source import fingerprint_of_files
from ..families.text.header import TOKENIZERS
from .contents import Unreadable, read_json
from .files import write_json
from .folder import JobError, JobFolder, Onlooker
from .prompts import PromptSplit, split_prompts

PROMPTS = "training_prompts.json"


def kept_prompts(folder: JobFolder) -> PromptSplit | None:
    """The prompts that a run began with; None for a run of an earlier version, which kept none.

    Raises:
        JobError: if they cannot be read, or are not those that the run began with.
    """
    known = folder.job().get("inputs", {}).get("prompts")
    try:
        kept = read_json(folder.root / PROMPTS)
    except Unreadable as error:
        raise JobError(f"{error}; restore it, or start a new run") from error
    if kept is None and known is None:
        return None
    split = kept and PromptSplit(tuple(kept["prompts"]), tuple(kept["held_out"]))
    if split is None or known not in (None, sign_of(split)):
        raise JobError(
            f"{folder.root / PROMPTS} is not what {folder.root} was started with; put it back, or "
            "start a new run"
        )
    return split


def keep_prompts(folder: JobFolder, split: PromptSplit) -> None:
    """Write the prompts of a run into its folder; only the first of several processes does."""
    if not isinstance(folder, Onlooker):
        lists = {"prompts": split.prompts, "held_out": split.held_out}
        write_json(folder.root / PROMPTS, lists)


def sign_of(split: PromptSplit) -> str:
    """SHA-256 of the prompts, in their order."""
    text = json.dumps([split.prompts, split.held_out], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs_of(config: TrainConfig, split: PromptSplit) -> dict[str, Any]:
    """The record of prompts and files in job.json.

    Returns:
        "prompts" and "files", the fingerprints of files by the fields that name them.
    """
    model = config.model
    named = {
        "trainable.init_lora": config.trainable.init_lora,
        "model.vae": model.vae,
        **{f"model.{one.field}": getattr(model, one.field) for one in TOKENIZERS.values()},
        **{f"model.text_encoders.{i}": path for i, path in enumerate(model.text_encoders)},
    }
    there = {field: Path(path) for field, path in named.items() if path and Path(path).exists()}
    files = {field: fingerprint_of_files(path) for field, path in there.items()}
    return {"prompts": sign_of(split), "files": files}


def check_inputs(
    inputs: dict[str, Any], config: TrainConfig, split: PromptSplit, root: Path
) -> list[str]:
    """Refuse to resume with other files than before; missing fingerprints are added to `inputs`.

    `JobError` names the field.

    Returns:
        Notes for the user, one sentence each.
    """
    now = inputs_of(config, split)
    inputs.setdefault("prompts", now["prompts"])
    before: Mapping[str, str] = inputs.setdefault("files", now["files"])
    other = [field for field, sign in now["files"].items() if before.get(field, sign) != sign]
    if other:
        raise JobError(
            f"{other[0]} is not the file that {root} was started with; put it back, or start a new "
            "run"
        )
    return _differences(config, split)


def _differences(config: TrainConfig, kept: PromptSplit) -> list[str]:
    """Compare the prompts with their files, on which the run does not depend."""
    goes_on = f"the run goes on with the prompts it began with ({PROMPTS} in its folder)"
    try:
        if split_prompts(config.prompts, config.run.eval_prompts).same_as(kept):
            return []
    except ConfigError as error:
        return [f"{error}; {goes_on}"]
    return [f"the prompts of {config.prompts.source} are others than at the start; {goes_on}"]

"""Checkpoints: all that a run needs to continue to the same bytes. Safetensors and JSON, no pickle.

checkpoints/00004/state.safetensors   parameters, their averages, AdamW's moments
checkpoints/00004/state.json          iteration, reward statistics, config, versions, checksums

Everything random is a function of (seed, iteration, image), so there is no generator to keep, and
the place among the prompts follows from the iteration.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...pcpo.finite import all_finite
from ..config.train_config import TrainConfig, difference, validate_stored
from ..distributed.sharding import gather_tensors, split_like
from ..errors import RunError, UserError
from ..job.contents import read_json
from ..job.files import checksum, replace_file, shortage
from ..job.folder import JobError, JobFolder
from ..job.leftovers import temporary
from ..report.versions import versions
from .endings import check_there
from .phases import phase
from .setup import Setup
from .update.learner import Learner, load_moments, moments_of

TENSORS, STATE = "state.safetensors", "state.json"
SPARE = 32 << 20  # bytes of a disk that are left for metrics and status


@dataclass(frozen=True, slots=True)
class Position:
    """The progress of a run.

    Attributes:
        before: mean held-out reward before training; NaN if it was not measured.
        best: highest mean held-out reward of a checkpoint, and its iteration; with a guard, the
            highest reward within its bounds.
        strikes: the guard's consecutive measurements out of bounds.
    """

    iteration: int = 0
    before: float = float("nan")
    best: tuple[float, int] | None = None
    strikes: int = 0


def machine() -> dict[str, Any]:
    """What equal bytes depend on: threads, processor, processes and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    count = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    return {
        "threads": torch.get_num_threads(),
        "device": device,
        **({"processes": count} if count > 1 else {}),
        **versions(),
    }


# --- writing -------------------------------------------------------------------------------------


@phase("checkpoint: file")
def save(
    setup: Setup, folder: JobFolder, at: Position, tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """Write a checkpoint, then remove those that are neither among the last nor the best.

    Args:
        tensors: from `tensors_of`; taken from the run if None.

    Raises:
        RunError: if the disk is full or writing failed; older checkpoints are intact.
    """
    check_there(folder)
    scaler = setup.processes.accelerator.scaler
    tensors = dict(tensors_of(setup) if tensors is None else tensors)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    final = folder.checkpoints / f"{at.iteration:05}"
    fresh = temporary(final)
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        if lack := shortage(fresh, needed, SPARE):
            raise RunError(
                f"the checkpoint of iteration {at.iteration} {lack}; free some space and resume"
            )
        with replace_file(fresh / TENSORS) as file:
            save_file(tensors, file)
        state = {
            "iteration": at.iteration,
            "before": at.before if at.before == at.before else None,
            "best": at.best,
            "strikes": at.strikes,
            "advantages": [_state_of(kind) for kind in setup.advantages.kinds],
            "rewards": setup.reward_set.state_dict(),
            **({"heads": heads} if (heads := setup.reward_set.tastes.digests()) else {}),
            "scaler": scaler.state_dict() if scaler else None,
            "config": setup.config.model_dump(mode="json"),
            "machine": machine(),
            "checksum": checksum(fresh / TENSORS),
        }
        state["seal"] = seal_of(json.loads(json.dumps(state, allow_nan=False)))
        (fresh / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        for name in (TENSORS, STATE):
            with (fresh / name).open("rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)  # made again after a resume
        fresh.rename(final)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunError(
            f"the checkpoint of iteration {at.iteration} could not be written to {final} "
            f"({why}); put that right and resume"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _prune(folder, setup.config.run.keep_checkpoints, at)
    return final


@phase("checkpoint: state")
def tensors_of(setup: Setup) -> dict[str, Tensor]:
    """The run's tensors by name, on the CPU of the first process; all processes must call this."""
    tensors = {f"parameter.{i}": p for i, p in enumerate(setup.learner.parameters)}
    if setup.learner.averaged is not None:
        tensors |= {f"average.{i}": mean for i, mean in enumerate(setup.learner.averaged.weights)}
    tensors |= moments_of(setup.learner.optimizer)
    return gather_tensors(tensors, setup.processes.is_first)


def _state_of(kind: Any) -> dict[str, Any] | None:
    return kind.state_dict() if hasattr(kind, "state_dict") else None


def _prune(folder: JobFolder, keep: int, at: Position) -> None:
    """Keep the last few and the best.

    Leftovers of a killed process are removed too, and damaged checkpoints that were skipped.
    """
    best = at.best[1] if at.best else None
    kept = [path for path in _kept_iterations(folder) if int(path.name) <= at.iteration][:keep]
    old = [path for path in _kept_iterations(folder) if path not in kept and int(path.name) != best]
    for path in [*old, *folder.checkpoints.glob(".*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def seal_of(state: Mapping[str, Any]) -> int:
    """CRC-32 of all that a run continues from.

    Config and machine are left out: they are compared with this run's.
    """
    sealed = {k: v for k, v in state.items() if k not in ("config", "machine", "seal")}
    return zlib.crc32(json.dumps(sealed, sort_keys=True).encode())


# --- reading -------------------------------------------------------------------------------------


def _kept_iterations(folder: JobFolder) -> list[Path]:
    entries = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else ()
    kept = [path for path in entries if re.fullmatch(r"[0-9]{5,}", path.name)]
    return sorted(kept, key=lambda path: int(path.name), reverse=True)


def newest(folder: JobFolder, config: TrainConfig) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint.

    Returns:
        Its folder, None if the run was stopped before its first one, and one sentence on what is
        wrong with each newer one.

    Raises:
        JobError: if none is intact, or they belong to another config.
    """
    damaged = []
    for path in _kept_iterations(folder):
        fault = _fault(path)
        if fault is None:
            _check_config(path, config)
            return path, damaged
        damaged.append(f"the checkpoint {path} is damaged ({fault}) and passed over")
    if damaged:
        raise JobError(f"{damaged[0]}; no other is there: start a new run")
    return None, []


def heads_of(path: Path) -> dict[str, str]:
    """Digests of the heads that the tastes of a checkpoint scored with, by the rewards' labels."""
    return (read_json(path / STATE) or {}).get("heads", {})


def _fault(path: Path) -> str | None:
    try:
        state = read_json(path / STATE) or {}
        if state["iteration"] != int(path.name):
            return f"{STATE} is of iteration {state['iteration']}"
        validate_stored(state["config"], STATE)
        if checksum(path / TENSORS) != state["checksum"]:
            return f"{TENSORS} is not what was written"
        with safe_open(path / TENSORS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                if not all_finite([file.get_tensor(name)]):
                    return f"{name} is not finite"
        if state.get("seal", seal_of(state)) != seal_of(state):  # earlier versions had none
            return f"{STATE} is not what was written"
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_config(path: Path, config: TrainConfig) -> None:
    written = json.loads((path / STATE).read_text(encoding="utf-8"))["config"]
    whole = validate_stored(written, str(path))  # an earlier version had fewer fields
    if listed := difference(whole, config, ["run.iterations"]):
        raise JobError(
            f"the checkpoint {path} is of another config: {listed}; put it back in job.json, or "
            "start a new run"
        )


def load(setup: Setup, path: Path) -> tuple[Position, list[str]]:
    """Restore a run, in place, from the checkpoint at `path`.

    Returns:
        Its progress, and notes for the user, one sentence each.

    Raises:
        JobError: if the checkpoint does not fit the model.
    """
    state, learner = read_json(path / STATE), setup.learner
    scaler = setup.processes.accelerator.scaler
    try:
        tensors = load_file(path / TENSORS)
        _copy(learner.parameters, tensors, "parameter")
        if learner.averaged is not None:
            _copy(learner.averaged.weights, tensors, "average")
            done = state["iteration"] * setup.config.optimizer.updates
            learner.averaged.count = done // setup.config.trainable.ema_every
        load_moments(learner.optimizer, _in_parts(learner, tensors))
        for kind, remembered in zip(setup.advantages.kinds, state["advantages"], strict=True):
            if remembered is not None:
                kind.load_state_dict(remembered)
        setup.reward_set.load_state_dict(state.get("rewards", {}))
        if state["scaler"] and scaler:
            scaler.load_state_dict(state["scaler"])
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:
        raise JobError(
            f"the checkpoint {path} does not fit the run ({type(error).__name__}: {error}); remove "
            "it to go on from the one before"
        ) from error
    before = float("nan") if state["before"] is None else state["before"]
    best = tuple(state["best"]) if state["best"] else None
    at = Position(state["iteration"], before, best, state.get("strikes", 0))
    return at, _differences(state["machine"])


def _in_parts(learner: Learner, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each moment over the processes as its parameter is."""
    if not learner.processes.is_sharded:
        return dict(tensors)
    parts = dict(tensors)
    for name in [name for name in parts if name.startswith("optimizer.")]:
        parameter = learner.parameters[int(name.split(".")[1])]
        if parts[name].shape == parameter.shape:  # not the number of steps
            parts[name] = split_like(parts[name], parameter)
    return parts


@torch.no_grad()
def _copy(targets: list[Any], tensors: Mapping[str, Tensor], kind: str) -> None:
    for i, target in enumerate(targets):
        target.copy_(split_like(tensors[f"{kind}.{i}"], target))


def _differences(before: Mapping[str, Any]) -> list[str]:
    one = {"processes": 1}
    before, now = {**one, **before}, {**one, **machine()}
    other = [f"{k} {before.get(k)} (now {now[k]})" for k in now if before.get(k) != now[k]]
    if not other:
        return []
    return [
        f"the run was made with {', '.join(other)}: it goes on, but the same bytes as without the "
        "interruption are not promised"
    ]

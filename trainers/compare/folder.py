"""The folder of a comparison. No torch.

compare.json                   the setup: config, methods, seeds, machines, commands
runs/LABEL/seed0/              an ordinary job folder; LABEL is METHOD, or METHOD-FIELD=VALUE
runs/LABEL/seed0.json          its config; seed0.log is what its process said
measures/LABEL/seed0.json      distances of its exports' images and predictions (images.py)
result.json, table.md          what it came to
compare.png, compare_vary.png  the same as plots
"""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config.train_config import ConfigError, TrainConfig, difference, validate_stored
from ..evaluate.comparison import (
    METHODS,
    OWN,
    SETUP,
    Comparison,
    Member,
    methods_of,
    read_setup,
)
from ..job.files import write_json
from ..job.preflight import check_folder, preflight
from ..job.worker import cores
from ..report.versions import versions


def check(asked: Comparison, name: str) -> list[Member]:
    """Check every run of a comparison before anything is written, and list its members.

    Raises:
        ConfigError: naming the field, the value and the remedy.
    """
    if asked.config.run.eval_prompts == 0:
        raise ConfigError("run.eval_prompts is 0, but the held-out reward is what is compared")
    if asked.config.guard.every > 0:
        raise ConfigError(
            f"guard.every is {asked.config.guard.every}, but a comparison needs runs of equal "
            "length; set it to 0"
        )
    check_folder(asked.out)
    members = asked.members()
    if len({member.folder.root for member in members}) < len(members):
        raise ConfigError(f"--vary {asked.varied_field}: two values would share one folder")
    for member in members:
        if member.seed == asked.seeds[0]:
            preflight(member.config, name)
        found = member.folder.read("job.json").get("config")
        if found is not None:
            now, there = member.config, validate_stored(found, str(member.folder.root / "job.json"))
            _refuse_difference(str(member.folder.root), there, now)
    return members


def _refuse_difference(
    where: str, before: TrainConfig, now: TrainConfig, ignored: Sequence[str] = ()
) -> None:
    """Refuse to mix two configs in one folder, naming every field that differs."""
    if listed := difference(before, now, ignored):
        raise ConfigError(f"{where} is of another config: {listed}; choose another folder (--out)")


# --- compare.json --------------------------------------------------------------------------------


def merge_with_folder(asked: Comparison) -> Comparison:
    """Merge a comparison with the one in its folder.

    The settings of the measurement are those asked for now; `ConfigError` if the folder's
    comparison has another config or varies something else.
    """
    if not os.path.exists(asked.out / SETUP):
        return asked
    old = read_setup(asked.out)
    if old.fields != asked.fields:
        was, now = old.varied_field or "nothing", asked.varied_field or "nothing"
        raise ConfigError(f"{asked.out} varies {was}, not {now}; choose another folder (--out)")
    own = (*OWN[:3], *asked.fields)
    _refuse_difference(str(asked.out), old.config, asked.config, own)
    return replace(
        asked,
        methods=methods_of([*old.methods, *asked.methods]),
        seeds=tuple(sorted({*old.seeds, *asked.seeds})),
        values=tuple(dict.fromkeys([*old.values, *asked.values])),
        machines=old.machines,
        commands=old.commands,
    )


def write_setup(whole: Comparison, arguments: Sequence[str]) -> Comparison:
    """Write compare.json, with this machine and this command added."""
    here, command = machine(), shlex.join(["pcpo", "compare", *arguments])
    whole = replace(
        whole,
        machines=(*(m for m in whole.machines if m != here), here),
        commands=(*(c for c in whole.commands if c != command), command),
    )
    setup = {
        "config": whole.config.model_dump(mode="json"),
        "methods": {name: METHODS[name] for name in whole.methods},
        "seeds": whole.seeds,
        "vary": {"fields": whole.fields, "values": whole.values},
        "measured": {"prompts": whole.prompts, "images": whole.images},
        "machines": whole.machines,
        "commands": whole.commands,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_json(whole.out / SETUP, setup)
    return whole


def machine() -> dict[str, Any]:
    """The machine and the versions of what is installed."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "versions": versions(),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()

"""The folder of a run: what is written there, atomically. Standard library only.

job.json        config and versions
status.json     state, iteration, of, ETA, message; replaced in one step
metrics.jsonl   one line an iteration
samples/ITER/   *.png and scores.json
lora/           *.safetensors, loadable anywhere
report/         plots and the comparison before and after
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Replace a file in one step, trying for 2 s where a reader holds it (Windows).

    Raises:
        PermissionError: where it is still held then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    fresh.write_text(text, encoding="utf-8")
    deadline = time.monotonic() + 2
    while True:
        try:
            return os.replace(fresh, file)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def write_json(file: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where a run writes.

    Attributes:
        root: the folder; made when first written to.
    """

    root: Path

    @property
    def samples(self) -> Path:
        """Sampled images, a folder an iteration."""
        return self.root / "samples"

    @property
    def lora(self) -> Path:
        """Exports that other programs load."""
        return self.root / "lora"

    @property
    def report(self) -> Path:
        """Plots and comparisons."""
        return self.root / "report"

    def is_used(self) -> bool:
        """Whether a run was started here."""
        return (self.root / "job.json").exists()

    def start(self, config: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Write the config that the run is made from."""
        write_json(self.root / "job.json", {"config": dict(config), "versions": dict(versions)})

    def status(self, state: str, **fields: Any) -> None:
        """Say how far the run is.

        Args:
            state: "preparing", "running", "done", "stopped" or "failed".
            fields: iteration, of, eta_seconds, message and the like.
        """
        now = {"state": state, "heartbeat": time.time(), "pid": os.getpid()}
        write_json(self.root / "status.json", {**now, **fields})

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one iteration's numbers."""
        with (self.root / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All iterations' numbers; a last line that was cut off is left out."""
        file = self.root / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def read(self, name: str) -> dict[str, Any]:
        """The contents of `job.json` or `status.json`; empty where there is none."""
        file = self.root / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

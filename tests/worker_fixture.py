"""A worker that trains nothing: python worker_fixture.py JOB_FOLDER [ITERATIONS [SECONDS]]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run.control import Control, Stopped, note_end, preparing


def main(root: str, count: str = "3", seconds: str = "0.05") -> None:
    folder, of = JobFolder(Path(root)), int(count)
    with folder.held(), preparing(folder):
        control = Control(folder, folder.root.parent)
        for iteration in range(len(folder.metrics()), of):
            try:
                control.between(iteration, of)
            except Stopped as stopped:
                return note_end(folder, stopped)
            time.sleep(float(seconds))
            folder.add_metrics({"iteration": iteration + 1, "reward": iteration / of})
            folder.status("running", iteration=iteration + 1, of=of, eta_seconds=1.0)
        folder.status("done", iteration=of, of=of, message="held-out reward 0.1 -> 0.2")


if __name__ == "__main__":
    main(*sys.argv[1:])

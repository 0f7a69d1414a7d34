"""The real command line in a process of its own, where it is to refuse something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LONGEST_S = 3.0
"""CPU seconds to refuse in. Usually below one; a busy machine without bytecode takes more."""

PROBE = """
import sys, time
from comfyui_pcpo.trainers.cli import main
code = main(sys.argv[1:])
print("torch" in sys.modules, time.process_time())
raise SystemExit(code)
"""


def files(root: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in root.rglob("*")}


def refused(folder: Path, *words: str) -> tuple[str, bool, float]:
    """What is said, whether torch was loaded, and the CPU seconds."""
    before = files(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert files(folder) == before
    line = [text for text in done.stderr.splitlines() if text.startswith("pcpo ")]
    assert len(line) == 1 and "Traceback" not in done.stderr, done.stderr
    loaded, seconds = done.stdout.split()[-2:]
    return line[0], loaded == "True", float(seconds)

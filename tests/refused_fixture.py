"""The real command line where it is to refuse something, in a process of its own or in this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from comfyui_pcpo.trainers.cli.command import main

LONGEST_S = 1.0
"""CPU seconds to refuse in."""

PROBE = """
import sys, time
from comfyui_pcpo.trainers.cli.command import main
code = main(sys.argv[1:])
print("torch" in sys.modules, time.process_time())
raise SystemExit(code)
"""


def files(root: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in root.rglob("*")}


def refused(folder: Path, *words: str) -> tuple[str, bool, float]:
    """What is said, whether torch was loaded, and the CPU seconds: of a further try or two where
    they are many, for the machine may have been busy."""
    for _ in range(3):
        line, is_loaded, seconds = _once(folder, words)
        if is_loaded or seconds < LONGEST_S:
            break
    return line, is_loaded, seconds


def refused_here(folder: Path, capsys, monkeypatch, *words: str) -> str:
    """What is said in this process, where torch and the trainer are loaded already."""
    before = files(folder)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert files(folder) == before
    line = [text for text in said.splitlines() if text.startswith("pcpo ")]
    assert len(line) == 1 and "Traceback" not in said, said
    return line[0]


def _once(folder: Path, words: Sequence[str]) -> tuple[str, bool, float]:
    before = files(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert files(folder) == before
    said = done.stderr.splitlines()
    line = [text for text in said if text.startswith("pcpo ")]
    assert len(line) == 1 and "Traceback" not in done.stderr, done.stderr
    loaded, seconds = done.stdout.split()[-2:]
    assert loaded == "True" or said == line, said  # no library is there to say anything else
    return line[0], loaded == "True", float(seconds)

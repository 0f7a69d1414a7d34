"""The commands that a message tells a user to run, each as it works where the message is read.

ComfyUI's Python has no command `pcpo`, and this pack is on no package index: there the pack's
folder is started by its path, and packages are called by their names.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PLAIN = re.compile(r"[\w:\\/.,+=@-]+")
"""A word that cmd and PowerShell take as it is."""


def command(*words: str | Path) -> str:
    """How this pack's command is called here.

    Args:
        words: after `pcpo`; those in capitals are for the user to fill in.

    Returns:
        It in backticks: `pcpo WORDS` where this process was started so, else by the pack's path.
    """
    started, known = Path(sys.argv[0]).absolute(), shutil.which("pcpo")
    if known is None or started.stem.lower() != "pcpo" or Path(known).parent != started.parent:
        return line([sys.executable, Path(__file__).with_name("trainers"), *words])
    runner = ["uv", "run"] if "UV_RUN_RECURSION_DEPTH" in os.environ else []
    return line([*runner, "pcpo", *words])


def install(*words: str) -> str:
    """How packages are installed into the Python that runs this.

    Args:
        words: names of packages, or options of pip.

    Returns:
        The command in backticks: of pip or, where this Python has none, of uv.
    """
    if find_spec("pip"):
        return line([sys.executable, "-m", "pip", "install", *words])
    return line(["uv", "pip", "install", "--python", sys.executable, *words])


def line(words: Sequence[str | Path], system: str = os.name) -> str:
    """Words as a shell takes them.

    Args:
        words: of a command.
        system: "nt" or "posix".

    Returns:
        One line in backticks, and what PowerShell wants besides.

    >>> line(["C:/my apps/python.exe", "-m", "pip"], "nt")
    '`"C:/my apps/python.exe" -m pip` (in PowerShell with & before it)'
    """
    if system != "nt":
        return f"`{shlex.join(map(str, words))}`"
    quoted = [w if PLAIN.fullmatch(w) else f'"{w}"' for w in map(str, words)]
    also = " (in PowerShell with & before it)" if quoted[0].startswith('"') else ""
    return f"`{' '.join(quoted)}`{also}"

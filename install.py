"""ComfyUI's Manager runs this after it has installed the requirements, each by a call of its own.

In a call of its own the newest diffusers takes the newest huggingface-hub along, with which the
transformers that is there may not work. All requirements in one call put that right, and change
nothing where nothing is wrong.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def command() -> list[str]:
    """The words that install all requirements at once, by pip or, where there is none, by uv."""
    installer = ["pip"] if find_spec("pip") else ["uv", "pip"]
    requirements = Path(__file__).with_name("requirements.txt")
    return [sys.executable, "-m", *installer, "install", "-r", str(requirements)]


if __name__ == "__main__":
    sys.exit(subprocess.call(command()))

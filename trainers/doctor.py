"""`pcpo doctor`: what is installed, which device, what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from .config import DEMO_FOLDER, ConfigError
from .versions import versions


def main(arguments: list[str]) -> int:
    """Print the state of this installation; 1 where something needed is missing.

    Raises:
        ConfigError: where there are arguments.
    """
    if arguments:
        raise ConfigError(f"doctor takes no arguments, but got {' '.join(arguments)}")
    found = versions()
    missing = [name for name, what in found.items() if what == "missing" and name != "comfyui-pcpo"]
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    for name, what in found.items():
        print(f"  {name:14} {what}")
    print("device:", _device(), sep="\n  ")
    demo = (DEMO_FOLDER / "model_index.json").is_file()
    print(f"demo model: {'there' if demo else 'MISSING: ' + str(DEMO_FOLDER)}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    print(f"free space here: {free:.1f} GiB" + ("; less than 1 GiB is little" if free < 1 else ""))
    if missing:
        print(f"missing: {', '.join(missing)}; install them with `pip install {' '.join(missing)}`")
    print("fit to run" if demo and not missing else "NOT fit to run: see above")
    return 0 if demo and not missing else 1


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "unknown: torch is missing"
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads; no CUDA device is visible"
    names = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        kind = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        names.append(f"{card.name}, {free:.1f} of {total:.1f} GiB free, use {kind}")
    return "\n  ".join(names)

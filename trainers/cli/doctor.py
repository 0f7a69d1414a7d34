"""`pcpo doctor`: what is installed, which device, what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from ...remedies import install
from ..config.arguments import Arguments, parse
from ..config.train_config import DEMOS
from ..job.cache_folder import cache_told
from ..report.versions import versions


def main(arguments: list[str]) -> int:
    """Print the state of this installation; 1 if something needed is missing."""
    parse(Arguments, arguments, "pcpo doctor", main.__doc__)
    installed = versions()
    missing = [
        name for name, what in installed.items() if what == "missing" and name != "comfyui-pcpo"
    ]
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    for name, what in installed.items():
        print(f"  {name:14} {what}")
    print("device:", _device(), sep="\n  ")
    absent = [folder for folder in DEMOS.values() if not (folder / "model_index.json").is_file()]
    print(f"demo models: {'MISSING: ' + ', '.join(map(str, absent)) if absent else 'there'}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    print(f"free space here: {free:.1f} GiB" + ("; less than 1 GiB is little" if free < 1 else ""))
    print(f"prompt embeddings: {cache_told()}")
    if missing:
        print(f"missing: {', '.join(missing)}; install them with {install(*missing)}")
    print("fit to run" if not (absent or missing) else "NOT fit to run: see above")
    return 0 if not (absent or missing) else 1


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

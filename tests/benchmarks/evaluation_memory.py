"""Memory and time of an evaluation by the number of images: it must not grow with them.

    python tests/benchmarks/evaluation_memory.py --images 1000 10000 --out memory.json

Each number is evaluated in a process of its own, two folders against each other, with the metrics
that need no weights. The images are links to a hundred small ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PROMPTS = 50


def make_folder(folder: Path, images: int, seed: int, side: int) -> Path:
    """Images of fifty prompts, links to a hundred files of noise."""
    folder.mkdir(parents=True)
    random, sources = np.random.default_rng(seed), []
    for i in range(100):
        source = folder / f"source{i}.tmp"
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source, "PNG")
        sources.append(source)
    listed = {}
    for i in range(images):
        name = f"{i:06}.png"
        os.link(sources[i % 100], folder / name)
        listed[name] = f"prompt {i % PROMPTS}"
    (folder / "prompts.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


def measure(images: int, side: int) -> dict[str, float]:
    """Peak memory and seconds of one evaluation, here in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = [str(make_folder(root / str(i), images, i, side)) for i in range(2)]
        words = ["--metrics", "fd_random", "pixel_diversity", "ssim_diversity"]
        command = ["evaluate", *folders, *words, "--device", "cpu", "--out", str(root / "out")]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--inside", *command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        peak = float(done.stdout.strip().splitlines()[-1])
        told = json.loads((root / "out" / "result.json").read_text(encoding="utf-8"))
        return {
            "images": 2 * images,
            "peak_mib": peak,
            "seconds": time.monotonic() - began,
            "milliseconds_an_image": 1000 * sum(told["seconds_an_image"].values()),
        }


def inside(words: list[str]) -> None:
    """Evaluate, then print this process's peak memory in MiB."""
    from comfyui_pcpo.trainers.cli.command import main as pcpo

    pcpo(words)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(arguments: list[str] | None = None) -> None:
    """Measure each number of images and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000], help="a side")
    parser.add_argument("--side", type=int, default=64, help="of an image, px")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args(arguments)
    found = [measure(images, a.side) for images in a.images]
    for line in found:
        print({name: round(value, 2) for name, value in line.items()})
    if a.out is not None:
        a.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if "--inside" in sys.argv:
        inside(sys.argv[sys.argv.index("--inside") + 1 :])
    else:
        main()

"""Milliseconds an image of each metric, with random weights, on a CPU or a GPU.

    python tests/benchmarks/metrics_speed.py --side 512 --batch 8
    python tests/benchmarks/metrics_speed.py --device cuda --batch 64

No weight file is needed: time does not depend on what the weights are. "resident" is how much more
memory the process holds after all images than after a tenth of them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfyui_pcpo.pcpo.metrics import InceptionScore, Moments, frechet_distance, load_features
from comfyui_pcpo.pcpo.metrics.dinov2 import Dinov2
from comfyui_pcpo.pcpo.metrics.inception import Inception
from comfyui_pcpo.pcpo.metrics.lpips import Lpips
from comfyui_pcpo.pcpo.metrics.similarity import pixel_diversity, ssim_diversity
from comfyui_pcpo.pcpo.pretrained.inception2015 import CLASSES
from comfyui_pcpo.pcpo.pretrained.lpips_net import NETS
from comfyui_pcpo.pcpo.pretrained.metric_networks import NETWORKS

MIB = 2**20


def with_random_weights(metric: type[Any], **networks: str) -> Any:
    """A metric without its files: networks by attribute, of keys of the catalogue."""
    made = object.__new__(metric)
    for name, key in networks.items():
        network = NETWORKS[key]().eval().requires_grad_(False)
        if name == "_heads":
            for weight in network.parameters():
                weight.abs_()
        for weight in network.parameters():
            weight.nan_to_num_(1.0, 1.0, 1.0).clamp_(-1, 1)
        made.__dict__[name] = network
    return made


def resident() -> float:
    """MiB that this process holds now; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    pages = int(file.read_text().split()[1]) if file.is_file() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB if pages else 0.0


def timed(work: Callable[[], object], images: int, repeats: int) -> float:
    """Milliseconds an image, the first call not counted."""
    work()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return 1000 * (time.perf_counter() - start) / (repeats * images)


def encoders(device: str) -> dict[str, Callable[[torch.Tensor], object]]:
    """What is done with a batch, by the name of the metric."""
    inception = with_random_weights(Inception, _network="inception_2015")
    dino = with_random_weights(Dinov2, _network="dinov2_large")
    random = load_features("fd_random")
    found: dict[str, Any] = {
        "fid + inception score": (inception, inception.both),
        "fd_dinov2": (dino, dino),
        "fd_random": (random, random),
    }
    for net, trunk in NETS.items():
        metric = with_random_weights(Lpips, _trunk=trunk, _heads=f"lpips_{net}")
        found[f"lpips {net}"] = (metric, metric.diversity)
    for metric, _ in found.values():
        for network in metric.modules():
            network.to(device)
    return {name: work for name, (_, work) in found.items()}


def streamed(size: int, images: int, batch: int) -> tuple[float, float]:
    """Milliseconds an image of the statistics alone, and the growth of memory in MiB."""
    moments, score = Moments(size), InceptionScore(images)
    rows, logits = torch.randn(batch, size), torch.randn(batch, CLASSES)
    start, held = time.perf_counter(), 0.0
    for at in range(0, images, batch):
        moments.add(rows[: images - at])
        score.add(logits[: images - at], range(at, min(at + batch, images)))
        if not held and at >= images // 10:
            held = resident()
    spent = time.perf_counter() - start
    return 1000 * spent / images, resident() - held if held else 0.0


def main(words: list[str] | None = None) -> dict[str, float]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="of the statistics alone")
    a = parser.parse_args(words)
    images = torch.randint(0, 256, (a.batch, 3, a.side, a.side), dtype=torch.uint8)
    found = {
        n: timed(lambda w=w: w(images), a.batch, a.repeats) for n, w in encoders(a.device).items()
    }
    found["pixel diversity"] = timed(lambda: pixel_diversity(images), a.batch, a.repeats)
    found["ssim diversity"] = timed(lambda: ssim_diversity(images), a.batch, a.repeats)
    found["statistics of 2048"], growth = streamed(2048, a.images, a.batch)
    for name, value in found.items():
        print(f"{name:24}{value:10.2f} ms/image")
    print(f"{'resident':24}{growth:+10.1f} MiB from {a.images // 10} to {a.images} images")
    one, other = Moments(2048), Moments(2048)
    for moments in (one, other):
        moments.add(torch.randn(2100, 2048))
    start = time.perf_counter()
    frechet_distance(one, other)
    print(f"{'distance of 2048':24}{time.perf_counter() - start:10.2f} s")
    return found


if __name__ == "__main__":
    main()

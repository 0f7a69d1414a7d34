"""What Implicit Reward Guidance by N LoRAs costs, against N + 1 plain steps.

    python tests/benchmarks/irg_speed.py --out irg.json
    COMFYUI_PATH=... COMFYUI_PYTHON=... PCPO_TINY_MODELS=... python tests/benchmarks/irg_speed.py

`pcpo sample --irg` is timed on the demo's network, and where COMFYUI_PATH names a ComfyUI its node
on the SD1.x fixture, with LoRAs on every layer. Processor's time of one thread, plain and guided
steps in turns, so that other programs do not show. "wide" is a plain step of N + 1 times the
images: what guidance would cost if the LoRAs were free; "hooks" is the same guidance by ComfyUI's
own LoRA hooks, which change the weights for each version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from comfyui_pcpo.trainers.config.train_config import DEMO_FOLDER
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.run import irg
from comfyui_pcpo.trainers.run.sampler import Policy

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from comfyui_fixture import HOST, MODELS, PACK, in_comfyui, report_in

LORA = DEMO_FOLDER.parent / "loras" / "scene.safetensors"
SCALE = 4.0


def in_turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, after a round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def sampled(counts: Sequence[int], batch: int, rounds: int) -> dict[str, float]:
    """Seconds a step of `pcpo sample`."""
    family = load_family(DEMO_FOLDER)
    plain = Policy(family, torch.no_grad, SCALE, "both", family.encode([""]))
    embeds, timestep = family.encode(["a red circle"]), torch.tensor(501)

    def step(policy: Policy, images: int) -> Callable[[], object]:
        x = torch.randn(images, 4, 8, 8)
        return lambda: policy(x, timestep, embeds.expand(images))

    work = {"plain": step(plain, batch)}
    for n in counts:
        own = load_family(DEMO_FOLDER)
        led = irg.guide(replace(plain, family=own), [(LORA, 0.3)] * n)
        work[f"wide N={n}"] = step(plain, batch * (n + 1))
        work[f"N={n}"] = step(led, batch)
        work[f"N={n} shared"] = step(replace(led, shares_negative=True), batch)
    with torch.no_grad():
        return in_turns(work, rounds)


def node(counts: Sequence[int], side: int, batch: int, rank: int, rounds: int) -> dict[str, float]:
    """Seconds a step of ComfyUI's sampling."""
    script = Path(__file__).parents[1] / "comfyui" / "scripts" / "comfyui_guidance_fixture.py"
    numbers = (side, batch, ",".join(map(str, counts)), rank, rounds, "hooks")
    return report_in(in_comfyui(script, PACK, "time", MODELS, *numbers, seconds=3600))


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Times over N + 1 plain steps, where a name says N."""
    found = {}
    for name, value in seconds.items():
        if number := re.search(r"N=(\d+)", name):
            found[name] = value / ((int(number[1]) + 1) * seconds["plain"])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print one line a measurement, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 3, 5], help="LoRAs")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--side", type=int, default=8, help="of ComfyUI's latents")
    parser.add_argument("--rank", type=int, default=4, help="of ComfyUI's LoRAs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds = {"pcpo sample": sampled(a.counts, a.batch, a.rounds)}
    if HOST:
        seconds["ComfyUI"] = node(a.counts, a.side, a.batch, a.rank, a.rounds)
    over = {where: ratios(found) for where, found in seconds.items()}
    for where, found in over.items():
        for name, ratio in found.items():
            print(f"{where:12} {name:12} {ratio:6.3f} of N + 1 plain steps")
    if a.out is not None:
        settings = {key: value for key, value in vars(a).items() if key != "out"}
        report = {"settings": settings, "seconds": seconds, "over_plain_steps": over}
        a.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A folder as a run of many iterations leaves it, written in seconds."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from PIL import Image

SPIKE = 123.25
"""The gradient norm of the one iteration that goes wrong."""


def line(i: int, of: int, every: int, chance: random.Random) -> dict:
    """An iteration's numbers, with the names of `trainers.run.iteration`."""
    reward = 0.4 + 0.3 * i / of + chance.gauss(0, 0.02)
    norms = [SPIKE if i == of // 3 else chance.lognormvariate(-2, 0.3) for _ in range(4)]
    steps = {"loss": -reward / 9, "kl": 0.0, "clip_fraction": chance.random() / 9}
    steps |= {"outside_fraction": chance.random() / 9, "log_ratio": chance.gauss(0, 1e-6)}
    steps |= {"log_ratio_std": 1e-5, "log_ratio_max": math.exp(chance.gauss(-9, 0.5))}
    return {
        "iteration": i,
        "reward": reward,
        "reward_std": 0.1 + chance.random() / 50,
        "reward_min": reward - 0.2,
        "reward_max": reward + 0.2,
        "reward_scene": reward,
        **steps,
        "grad_norm": sum(norms) / len(norms),
        "clip_fraction_on_policy": 0.0,
        "outside_fraction_on_policy": 0.0,
        "log_ratio_max_on_policy": 0.0,
        "log_ratio_histogram": [0, 1, 3, 9, 20, 44, 97, 230, 700, 2000, 4300] * 2,
        "grad_norms": norms,
        "seconds": 1.0 + chance.random() / 10,
        "seconds_rollout": 0.6,
        "seconds_update": 0.4 + chance.random() / 10,
        "images_per_second": 30 + chance.random(),
        **({"held_out": reward} if i % every == 0 else {}),
    }


def long_run(
    root: Path, iterations: int, every: int = 10, images: int = 4, side: int = 512
) -> JobFolder:
    """A finished run: metrics, samples and a log.

    Args:
        root: the folder.
        iterations: of the run.
        every: iterations between two evaluations.
        images: of an evaluation; the same file by hard links.
        side: of an image, px.

    Returns:
        Its folder.
    """
    folder, chance = JobFolder(root), random.Random(0)
    method = {"credit": "proportionate", "objective": "ppo_clip", "ratio": "epsilon_matching"}
    run = {"iterations": iterations, "save_every": every}
    config = {"method": method, "rewards": {"scene": {}}, "model": {"source": "m"}, "run": run}
    write_json(root / "job.json", {"config": config, "name": "long", "created": 1.0})
    lines = (line(i, iterations, every, chance) for i in range(1, iterations + 1))
    with (root / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)
    with folder.log.open("w") as file:
        file.writelines(f"iteration {i}/{iterations}  reward 0.5\n" for i in range(iterations))
    picture = root / "picture.png"
    Image.effect_noise((side, side), 60).convert("RGB").save(picture)
    scores = json.dumps([{"prompt": f"prompt {i}", "reward": 0.5} for i in range(images)])
    for i in range(0, iterations + 1, every):
        place = folder.samples / f"{i:05}"
        place.mkdir(parents=True)
        for image in range(images):
            os.link(picture, place / f"{image:03}.png")
        (place / "scores.json").write_text(scores)
    place = {"iteration": iterations, "of": iterations}
    folder.status("done", **place, message="held-out reward 0.400 -> 0.700")
    return folder


def cost(script: str, *arguments: object) -> tuple[float, float]:
    """What statements cost in a process of their own, without its imports.

    Args:
        script: the imports, a line "---", and what is measured.
        arguments: sys.argv[1:] of it.

    Returns:
        Seconds of the processor, and the growth of the largest resident set in MiB.
    """
    imports, measured = script.split("---")
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    lines = f"import resource, sys, time\n{imports}\nstart, before = time.process_time(), {peak}\n"
    lines += f"{measured}\nprint(time.process_time() - start, {peak} - before)"
    command = [sys.executable, "-c", lines, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, grown = map(float, out.splitlines()[-1].split())
    return seconds, grown

"""What an iteration of PCPO costs beside its baseline's: everything equal but the method.

    python tests/benchmarks/method_cost.py --out cost.json

DDPO's preset for Stable Diffusion 1.5 on tiny-sd, and Flow-GRPO's for SD3.5-M on tiny-flow, with
few images and no KL. Iterations of the two alternate in one process, on its own clock, so that what
else the machine does hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.run.setup import Setup, prepare

CASES = {"sd15-aesthetic": ("ddpo", "demo"), "sd35-ocr": ("flowgrpo", "demo-flow")}
"""By preset: its baseline, and the model that it is measured on."""


def config_of(preset: str, model: str, images: int) -> TrainConfig:
    """A preset of the paper on a shipped model, small."""
    values = read_preset(preset).model_dump(mode="json")
    values["model"] = {"source": model}
    values["rewards"] = {"brightness": 1.0}
    values["method"]["kl_weight"] = 0.0
    values["sampler"] |= {"steps": 10}
    values["trainable"] |= {"targets": []}
    values["prompts"] |= {"source": "scenes", "per_iteration": 1, "images_per_prompt": images}
    values["run"] |= {"micro_batch": 8, "eval_prompts": 0, "device": "cpu"}
    return validate(values, preset)


def seconds_of(setup: Setup, number: int) -> dict[str, float]:
    """One iteration's, by part."""
    begun = time.process_time()
    line = one_iteration(setup, number)
    whole = time.process_time() - begun
    rollout = line["seconds_rollout"] / line["seconds"] * whole
    return {"rollout": rollout, "update": whole - rollout, "iteration": whole}


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5, help="of iterations; one more goes before")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = {}
    for preset, (baseline, model) in CASES.items():
        both = [
            prepare(config_of(name, model, a.images)) for name in (preset, f"{preset}-{baseline}")
        ]
        seen = [[seconds_of(setup, n) for setup in both] for n in range(a.pairs + 1)][1:]
        ratios = {k: [ours[k] / theirs[k] for ours, theirs in seen] for k in seen[0][0]}
        report[preset] = {
            "model": model,
            "seconds": {
                name: {k: statistics.median(pair[i][k] for pair in seen) for k in ratios}
                for i, name in enumerate(("pcpo", "baseline"))
            },
            "ratio": {k: statistics.median(v) for k, v in ratios.items()},
            "ratios": ratios["iteration"],
        }
        print(preset, report[preset], flush=True)
    a.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

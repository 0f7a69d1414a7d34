"""`pcpo profile` over the three families, to a file that a later one can be compared with.

    python tests/benchmarks/profile_families.py --out before.json
    python tests/benchmarks/profile_families.py --before before.json --out after.json

The shipped tiny-sd and tiny-flow, and a tiny FLUX with random weights. On a CPU the clock is that
of the process, so that what else the machine does counts little. `--before` adds each phase's ratio
to an earlier file's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.profile.command import profile, table

FLUX: dict[str, Any] = {
    "sampler": {"transition": "dance_sde", "noise_level": 0.3, "steps": 8, "drop_last": 1}
    | {"grid": "uniform", "shift": 3.0},
    "model": {"width": 64, "height": 64, "t5_length": 64},
    "trainable": {"rank": 16, "alpha": 16.0},
    "advantage": {"kind": "group"},
    "rewards": {"brightness": 1.0},
}


def config_of(family: str, model: Path, images: int, *, is_compiled: bool) -> TrainConfig:
    """A family's config, small."""
    presets = {"tiny-sd": "demo", "tiny-flow": "demo-flow"}
    if family in presets:
        values = read_preset(presets[family]).model_dump(mode="json")
    else:
        values = FLUX | {"model": FLUX["model"] | {"source": str(model)}}
    values |= {"prompts": {"source": "scenes", "per_iteration": 2, "images_per_prompt": images}}
    values["run"] = values.get("run", {}) | {"micro_batch": images, "eval_prompts": 8}
    values["model"] = values["model"] | {"compile": is_compiled}
    values["method"] = values.get("method", {}) | {"update": "two_pass"}  # what can be compiled
    return validate(values, family)


def main(arguments: list[str] | None = None) -> None:
    """Profile and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=["tiny-sd", "tiny-flow", "flux"])
    parser.add_argument("--images", type=int, default=8, help="of a prompt, and a forward pass")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the blocks, see `model.compile`")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(arguments)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    before = json.loads(a.before.read_text()) if a.before else {}
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = flux_fixture.write_folder(Path(folder) / "flux", vae="tiny")
        for family in a.families:
            AcceleratorState._reset_state(reset_partial_state=True)
            config = config_of(family, model, a.images, is_compiled=a.compile)
            found = profile(config, a.iterations, clock)
            print(table(found, family), end="\n\n", flush=True)
            report[family] = found.as_json()
            if family in before:
                report[family]["ratio"] = ratios(report[family], before[family])
            a.out.write_text(json.dumps(report, indent=2))


def ratios(now: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase, and of all, over those before."""
    after, ago = (
        {k: phase["seconds"] for k, phase in found["phases"].items()} | {"all": found["seconds"]}
        for found in (now, before)
    )
    return {name: after[name] / ago[name] for name in after if ago.get(name)}


if __name__ == "__main__":
    main()

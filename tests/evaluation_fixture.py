"""Made-up runs, comparisons and folders of images, to be evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from comfyui_pcpo.trainers.compare.folder import write_setup
from comfyui_pcpo.trainers.compare.measures import SERIES
from comfyui_pcpo.trainers.compare.setup import Comparison
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from PIL import Image


def config_of(iterations: int) -> TrainConfig:
    """The demo's, evaluated at every iteration."""
    values = read_preset("demo").model_dump()
    values["run"] |= {"iterations": iterations, "save_every": 1, "device": "cpu"}
    return validate(values, "test")


def made_up_run(folder: JobFolder, config: TrainConfig, rewards: Sequence[float]) -> None:
    """The files of a finished run; `rewards` are the base's and each iteration's."""
    values = config.model_dump(mode="json")
    folder.start({"config": values, "inputs": {"model": "x"}, "versions": {"threads": 1}})
    write_json(folder.samples / "00000" / "scores.json", [{"prompt": "", "reward": rewards[0]}])
    folder.lora.mkdir()
    for i, reward in enumerate(rewards[1:], 1):
        line = {"iteration": i, "seconds": 10.0} | {name: i / 8 for name in SERIES}
        folder.add_metrics(line | {"held_out": reward})
        (folder.lora / f"pcpo_{i:05}.safetensors").touch()
    folder.status("done")


def made_up_comparison(out: Path, rewards: Mapping[tuple[str, int], Sequence[float]]) -> Comparison:
    """Runs by method and seed, each with as many iterations."""
    count = len(next(iter(rewards.values()))) - 1
    methods = tuple(dict.fromkeys(method for method, _ in rewards))
    seeds = tuple(sorted({seed for _, seed in rewards}))
    found = write_setup(Comparison(out, config_of(count), methods, seeds), ["--made", "up"])
    for member in found.members():
        made_up_run(member.folder, member.config, rewards[member.method, member.seed])
        kinds = ("diversity", "drift_pixels", "drift_prediction")
        names = ["base", *(f"pcpo_{i:05}.safetensors" for i in range(1, count + 1))]
        write_json(member.measures, {name: dict.fromkeys(kinds, 0.1) for name in names})
    return found


def picture_folder(
    folder: Path, prompts: Mapping[str, Sequence[int]], side: int = 16, noise: int = 0
) -> Path:
    """Grey pictures by prompt, each number a grey level; noise is added to each pixel."""
    folder.mkdir(parents=True)
    random, listed, number = np.random.default_rng(7), {}, 0
    for prompt, greys in prompts.items():
        for grey in greys:
            pixels = np.full((side, side, 3), grey, dtype=np.int64)
            pixels += random.integers(-noise, noise + 1, pixels.shape)
            name = f"{number:04}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
            listed[name] = prompt
            number += 1
    write_json(folder / "prompts.json", listed)
    return folder

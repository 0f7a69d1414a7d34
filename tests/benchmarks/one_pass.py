"""One pass beside two: seconds an iteration and peak memory, at equal settings.

    python tests/benchmarks/one_pass.py --model tiny-sd tiny-flow --group 4 8 16 --out one_pass.json

Every step is trained, one update an iteration, guidance as the preset has it. Both ways run in one
process, turn by turn, so that what else the machine does falls on both; the figure is the median
over turns of the seconds of processor time (of the clock on a GPU). Peak memory is that of a
process that has gone one way alone. On a GPU use a preset and a model of your own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.run.setup import Setup, prepare

WAYS = ("two_pass", "one_pass")
PRESETS = {"tiny-sd": "demo", "tiny-flow": "demo-flow"}


def config_of(a: argparse.Namespace, model: str, group: int, way: str) -> TrainConfig:
    """The preset with every step trained and one update."""
    values = read_preset(PRESETS.get(model, model)).model_dump(mode="json")
    values["method"] |= {"update": way, "selection": "all"}
    values["sampler"]["steps"] = a.steps or values["sampler"]["steps"]
    values["prompts"] |= {"per_iteration": a.prompts, "images_per_prompt": group}
    values["optimizer"]["updates"] = 1
    values["advantage"]["global_std"] = a.global_std
    values["run"] |= {"eval_prompts": 0, "micro_batch": a.micro_batch, "device": a.device}
    for change in a.set:
        name, _, value = change.partition("=")
        section, field = name.split(".")
        values[section][field] = json.loads(value)
    return validate(values, "the benchmark")


def seconds(setup: Setup, number: int) -> float:
    """Of one iteration."""
    is_gpu = setup.processes.device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    started = clock()
    one_iteration(setup, number)
    if is_gpu:
        torch.cuda.synchronize()
    return clock() - started


def peak_mib(words: list[str], way: str) -> float:
    """Of a process of its own, in which glibc gives back at once what is let go of."""
    command = [sys.executable, __file__, *words, "--alone", way]
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout
    return json.loads(said.splitlines()[-1])


def alone(a: argparse.Namespace) -> None:
    """One way, for its peak memory in MiB: what two iterations add to what was there before."""
    setup = prepare(config_of(a, a.model[0], a.group[0], a.alone))
    if setup.processes.device.type == "cuda":
        for number in range(2):
            seconds(setup, number)
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    process, is_over = psutil.Process(), threading.Event()
    before, seen = process.memory_info().rss, [0]

    def watch() -> None:
        while not is_over.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(2):
        seconds(setup, number)
    is_over.set()
    watcher.join()
    print((max(seen) - before) / 2**20)


def measured(a: argparse.Namespace, words: list[str], model: str, group: int) -> dict[str, Any]:
    """Both ways for one model and group size."""
    setups = {way: prepare(config_of(a, model, group, way)) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(a.turns + 1):
        for way in WAYS:
            took = seconds(setups[way], number)
            if number:  # the first one warms up
                times[way].append(took)
    found = {way: statistics.median(t) for way, t in times.items()}
    ratios = [one / two for one, two in zip(times["one_pass"], times["two_pass"], strict=True)]
    one = ["--model", model, "--group", str(group), *words]
    peaks = {way: peak_mib(one, way) for way in WAYS} if a.memory else {}
    return {
        "model": model,
        "group": group,
        "images": setups["one_pass"].config.images,
        "seconds": found,
        "ratio": statistics.median(ratios),
        "peak_mib": peaks,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(PRESETS), help="or names of presets")
    parser.add_argument("--group", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0, help="of the sampler; 0 is the preset's")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--global-std", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=JSON")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", choices=WAYS, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.alone:
        return alone(a)
    words = ["--prompts", str(a.prompts), "--steps", str(a.steps), "--device", a.device]
    words += ["--micro-batch", str(a.micro_batch), *(["--global-std"] if a.global_std else [])]
    words += ["--set", *a.set] if a.set else []
    cases = []
    for model in a.model:
        for group in a.group:
            cases.append(measured(a, words, model, group))
            print(json.dumps(cases[-1]), flush=True)
    if a.out:
        a.out.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": cases}, indent=2))


if __name__ == "__main__":
    main()

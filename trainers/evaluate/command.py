"""`pcpo evaluate`: is a model better than its base on untrained rewards, and as diverse?

read what is compared                       (sides.py)
sample what is missing, in all processes    (images.py)
list the available metrics                  (suite.py)
measure, prompt after prompt                (metrics.py)
compute intervals and tests                 (numbers.py)
write tables and the page                   (report.py)
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..config import bounds
from ..config.arguments import Arguments, Repeated, Words, parse
from ..config.bounds import Batch, Group, Processes, Prompts, Seed
from ..config.sections import Precision
from ..config.train_config import DEMOS, ConfigError, TrainConfig, read_preset, validate
from ..distributed.launcher import check_devices, is_first, processes, start_all
from ..families.files import FIELDS
from ..job.files import write_json
from ..job.folder import JobFolder
from ..job.inputs import kept_prompts
from ..job.preflight import hold_folder
from ..job.prompts import BUILT_IN, HELD_OUT, read_prompts
from ..reading import check_target, shown
from ..report.progress import Progress, clock
from .sides import BASE, Given, Side, check_prompts, images_of, read_things

PLAN, LOCK = "evaluation.json", "evaluate.lock"
DEMO_OF = {None: "demo", "demo": "demo", "demo-flow": "demo-flow"}
"""The preset of a demo's model; without a run, its sampler and reward are used."""


class EvaluateArguments(Arguments):
    """Evaluate a model against LoRAs, runs or folders of images, on equal prompts and seeds."""

    things: Words = Field(
        description="PATH or NAME=PATH of a run (PATH@ITERATION for one of its exports), a LoRA, a "
        "folder of images, or the folder of a comparison, for all its runs; if all are "
        "folders of images, the first one is the base"
    )
    model: str | None = Field(
        default=None, description="the base; by default that of the first run, else 'demo'"
    )
    text_encoders: tuple[str, ...] | None = Field(
        default=None, description="files of text encoders, as in the command sample"
    )
    vae: str | None = Field(default=None, description="file of the autoencoder")
    t5_tokenizer: str | None = Field(default=None, description="folder with T5's tokenizer")
    qwen_tokenizer: str | None = Field(default=None, description="folder with Qwen3's tokenizer")
    prompts: str | None = Field(
        default=None,
        description="a built-in set or a file; by default the run's held-out prompts, the demo's, "
        "or the 45 animals",
    )
    limit: Prompts = Field(default=45, description="use the first prompts only")
    count: Group = Field(default=16, description="images of each prompt")
    seed: Seed = Field(default=0, description="base seed of all images")
    steps: int | None = Field(
        default=None,
        ge=1,
        le=bounds.STEPS,
        description="of the sampler; by default as in the run's own evaluation",
    )
    noise: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="of the sampler; by default as in the run's own evaluation",
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, le=bounds.GUIDANCE, description="1 means no guidance"
    )
    negative_prompt: str | None = Field(
        default=None, description="prompt of the unconditional branch"
    )
    width: int | None = Field(default=None, ge=8, le=bounds.SIDE, description="px")
    height: int | None = Field(default=None, ge=8, le=bounds.SIDE, description="px")
    precision: Precision | None = Field(default=None, description="dtype of the network")
    batch: Batch = Field(
        default=16,
        description="images per forward pass on a GPU; it changes images only by rounding. A CPU "
        "draws them one by one",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    metrics: list[str] = Field(
        default=[],
        description="only these metrics (fid, fd_dinov2, fd_random, lpips_diversity, "
        "pixel_diversity, ssim_diversity, names of rewards, ...); by default all that "
        "are available",
    )
    reward: Repeated = Field(
        default=[],
        description="NAME of a reward besides the usual ones and the run's own; may be repeated",
    )
    options: list[str] = Field(
        default=[], description="NAME.OPTION=VALUE ...: options of the rewards"
    )
    reference: str | None = Field(
        default=None, description="folder of images to measure distances to, instead of the base's"
    )
    methods: list[str] = Field(
        default=[], description="use only a comparison's runs of these methods"
    )
    matched: bool = Field(
        default=False,
        description="compare two runs, or a comparison's runs at equal seeds, at the exports of "
        "nearest held-out reward",
    )
    at_reward: float | None = Field(
        default=None,
        ge=-bounds.LARGE,
        le=bounds.LARGE,
        description="with --matched: the reward to match, instead of the highest that both reach",
    )
    out: str | None = Field(
        default=None, description="folder of the results; evaluations/NAME by default"
    )
    num_processes: Processes = Field(default=None, description="processes on this machine")


def main(arguments: list[str]) -> int:
    """Evaluate, or continue an evaluation: the same command makes what is missing."""
    a = parse(EvaluateArguments, arguments, "pcpo evaluate")
    count = processes(a.num_processes)
    given = _sides_of_words(a)
    out = Path("evaluations") / _name(a.things) if a.out is None else Path(a.out)
    check_target(out if a.out is None else a.out, "--out", is_folder=True)
    if a.reference is not None and not os.path.isdir(a.reference):
        raise ConfigError(f"--reference is {shown(a.reference)}, which is no folder of images")
    config = _config(a, given)
    sides = _sides(a, given)
    prompts = _prompts(a, given.config, config, sides)
    _check_folders(sides, prompts)
    if count > 1:
        check_devices(count, a.device)
        words = ["evaluate", *arguments, "--out", str(out)]
        return start_all(count, words, out, again="the same command")
    say = Progress(sys.stdout if is_first() else None).say
    plan = _plan(a, config, prompts, sides)
    with hold_folder(out, "evaluate") if is_first() else nullcontext():
        _check_plan(out, plan)
        if not _generate(a, config, prompts, sides, out, plan, say):
            return 0  # one of several processes: the first one measures
        return _report(a, config, sides, prompts, out, plan, arguments, say)


def _sides_of_words(a: EvaluateArguments) -> Given:
    """The things that the words name, matched by reward if asked for."""
    if not a.things:
        raise ConfigError("name what is to be evaluated: runs, LoRAs or folders of images")
    if a.at_reward is not None and not a.matched:
        raise ConfigError("--at-reward is for --matched; add it, or leave --at-reward out")
    given = read_things(a.things)
    _check_alike(a, given)
    if a.methods:
        chosen = tuple(side for side in given.sides if side.method in a.methods)
        given = replace(given, sides=chosen)
        strange = [name for name in a.methods if name not in {s.method for s in given.sides}]
        if strange:
            raise ConfigError(f"no run is of the method {strange[0]!r}; leave it out of --methods")
    if not a.matched:
        return given
    from .matched import matched_sides

    return replace(given, sides=matched_sides(given.sides, a.at_reward))


def _check_alike(a: EvaluateArguments, given: Given) -> None:
    """Refuse runs of different models or held-out prompts, unless those to use are given."""
    for field, known in (("model", a.model), ("prompts", a.prompts)):
        there = list(dict.fromkeys(getattr(config, field).source for config in given.configs))
        if known is None and len(there) > 1:
            raise ConfigError(
                f"the runs have different {field}.source, {there[0]!r} and {there[1]!r}; evaluate "
                f"them apart, or say which to use with --{field}"
            )


def _name(things: Sequence[str]) -> str:
    words = [Path(word.partition("=")[2] or word).name for word in things[:3]]
    return re.sub(r"[^\w.+=,-]", "_", "-".join(words)) or "evaluation"


def _config(a: EvaluateArguments, given: Given) -> TrainConfig:
    """Model and sampler: the first run's, with the options given."""
    start = given.config
    if start is None:
        start = read_preset(DEMO_OF[a.model]) if a.model in DEMO_OF else TrainConfig()
    values = start.model_dump()
    parts = (*FIELDS, "width", "height", "precision")
    model = {"source": a.model, **{name: getattr(a, name) for name in parts}}
    changes = {
        "model": model,
        "sampler": {"guidance_scale": a.guidance_scale, "negative_prompt": a.negative_prompt},
        "run": {"eval_steps": a.steps, "eval_noise": a.noise, "device": a.device},
    }
    for section, fields in changes.items():
        values[section] |= {name: value for name, value in fields.items() if value is not None}
    return validate(values, "pcpo evaluate")


def _sides(a: EvaluateArguments, given: Given) -> tuple[Side, ...]:
    """The base and the others; the first folder is the base if there is nothing to sample."""
    if a.model is None and all(side.kind == "images" for side in given.sides):
        return given.sides
    return (Side(BASE, "base", method=BASE), *given.sides)


def _prompts(
    a: EvaluateArguments, of_run: TrainConfig | None, config: TrainConfig, sides: Sequence[Side]
) -> tuple[str, ...]:
    if sides[0].kind == "images" and sides[0].path is not None:
        return tuple(images_of(sides[0].path))
    source = a.prompts
    if source is None and of_run is not None:
        run = next((side.run for side in sides if side.run is not None), None)
        kept = run and kept_prompts(JobFolder(run))
        if kept and of_run.prompts.source not in BUILT_IN:
            is_held_out = not {*kept.held_out} & {*kept.prompts}
            chosen = kept.held_out if kept.held_out and is_held_out else kept.prompts
            return tuple(dict.fromkeys(chosen))[: a.limit]
        source = HELD_OUT.get(of_run.prompts.source, of_run.prompts.source)
    if source is None:
        source = "scenes_held_out" if config.model.source in DEMOS else "animals"
    prompts = tuple(dict.fromkeys(read_prompts(source)))
    return prompts[: a.limit]


def _check_folders(sides: Sequence[Side], prompts: Sequence[str]) -> None:
    for side in sides:
        if side.kind == "images" and side.path is not None:
            check_prompts(side.name, list(images_of(side.path)), prompts)


def _plan(
    a: EvaluateArguments, config: TrainConfig, prompts: Sequence[str], sides: Sequence[Side]
) -> dict[str, Any]:
    """The settings that the images depend on."""
    values = config.model_dump(mode="json")
    sampled = [side for side in sides if side.kind != "images"]
    sampler = {**values["sampler"], "steps": config.run.eval_steps, "noise": config.run.eval_noise}
    settings = {
        "model": values["model"],
        "sampler": sampler,
        "prompts": list(prompts),
        "count": a.count,
        "seed": a.seed,
    }
    return {
        "settings": settings if sampled else {"prompts": list(prompts)},
        "sides": {side.name: side.identity() for side in sampled},
    }


def _check_plan(out: Path, plan: Mapping[str, Any]) -> None:
    """Refuse to mix two evaluations in one folder, naming what differs."""
    there = JobFolder(out).read(PLAN)
    if not there:
        if out.is_dir() and any(file.name not in (PLAN, LOCK) for file in out.iterdir()):
            raise ConfigError(f"{out} holds something else; choose another folder (--out)")
        return
    differ = [k for k, v in plan["settings"].items() if there["settings"].get(k) != v]
    differ += [k for k, v in plan["sides"].items() if there["sides"].get(k, v) != v]
    if differ:
        raise ConfigError(
            f"{out} is of another evaluation: {', '.join(differ)} differ; choose another folder "
            "(--out)"
        )


def _generate(
    a: EvaluateArguments,
    config: TrainConfig,
    prompts: Sequence[str],
    sides: Sequence[Side],
    out: Path,
    plan: Mapping[str, Any],
    say: Any,
) -> bool:
    """Make the missing images; False in all processes but the first."""
    sampled = [side for side in sides if side.kind != "images"]
    if not sampled:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, plan)
        return True
    from ..distributed.processes import Processes, accelerator_of
    from ..memory.devices import device_of
    from .images import Wanted, list_prompts, make_images

    device = device_of(a.device)
    processes = Processes(accelerator_of(device.type == "cpu", "no"))
    wanted = Wanted(tuple(prompts), a.count, a.seed, a.batch, config)
    with processes.in_agreement():
        if processes.is_first:
            there = JobFolder(out).read(PLAN)
            write_json(out / PLAN, {**plan, "sides": there.get("sides", {}) | plan["sides"]})
            for side in sampled:
                list_prompts(out / "images" / side.name, wanted)
    share = (processes.rank, processes.count)
    with processes.in_agreement():
        make_images(sampled, out / "images", wanted, processes.accelerator.device, share, say)
    return processes.is_first


def _report(
    a: EvaluateArguments,
    config: TrainConfig,
    sides: Sequence[Side],
    prompts: Sequence[str],
    out: Path,
    plan: Mapping[str, Any],
    arguments: Sequence[str],
    say: Any,
) -> int:
    """Measure and write; 1 if an image could not be read or scored."""
    from ..memory.devices import device_of
    from ..report.versions import versions
    from .metrics import measure
    from .numbers import summarise
    from .report import write_report
    from .suite import suite_of, told_rewards

    folders = {s.name: s.path if s.kind == "images" else out / "images" / s.name for s in sides}
    files = {name: images_of(path) for name, path in folders.items() if path is not None}
    own = config if sides[0].kind == BASE else None  # folders alone have no run
    suite = suite_of(a.metrics, told_rewards(own, a.reward, a.options), prompts)
    reference = (
        [f for some in images_of(Path(a.reference)).values() for f in some] if a.reference else []
    )
    say(f"measuring {sum(len(f) for by in files.values() for f in by.values())} images")
    began = datetime.now()
    measured, seconds = measure(files, prompts, suite, device_of(a.device), say, reference)
    result = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["pcpo", "evaluate", *arguments]),
        "versions": versions(),
        "settings": plan["settings"],
        "reference": a.reference,
        "prompts_used": list(prompts),
        "missing": suite.missing,
        "fingerprints": suite.fingerprints(),
        "seconds_an_image": seconds,
        **summarise(sides, measured),
    }
    say(f"measured in {clock((datetime.now() - began).total_seconds())}")
    print(write_report(out, result, files, measured))
    print(f"tables and report in {out}: report.html")
    return 1 if any(side["faults"] for side in result["sides"]) else 0

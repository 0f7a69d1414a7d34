"""Make the demo model again: `python -m comfyui_pcpo.trainers.demo --help`.

Everything lies in one work folder: `autoencoder/` (checkpoint and `vae/`), `latents.safetensors`,
`tokenizer/` and `diffusion/` (checkpoint and one pipeline folder per kept step). The flow model,
which starts from the shipped `tiny_sd/`, adds `flow_latents.safetensors`, `flow_tokenizer/` and
`flow/`. An interrupted stage resumes from its last checkpoint; a finished one does nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..config.train_config import DEMO_FOLDER
from . import autoencoder, diffusion, flow, latents, tokenizer
from .fit import Settings, fit

LATENTS = 20_000
LATENTS_SEED = 0

_PACE = ("save_every", "evaluate_every")  # when to write; a resumed run may change these alone
_MACHINE = ("_name_or_path", "is_local", "local_files_only")


class Refused(Exception):
    """A stage that cannot run, and what to do about it."""


def run_autoencoder(work: Path, settings: autoencoder.Settings) -> None:
    _check_same(work / "autoencoder", settings)
    autoencoder.train(work / "autoencoder", settings)


def run_latents(work: Path, count: int = LATENTS, seed: int = LATENTS_SEED) -> latents.Latents:
    """Draw and encode scenes once.

    `Refused` if there is no autoencoder, or the folder holds another number of latents.
    """
    return _latents(_trained_autoencoder(work), work / "latents.safetensors", count, seed)


def _latents(vae: AutoencoderTiny, file: Path, count: int, seed: int) -> latents.Latents:
    """Read a file's latents, or make them if it is missing."""
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    data = latents.cache(vae, file, count, seed)
    if len(data.latents) != count:
        raise Refused(
            f"{file} holds {len(data.latents)} latents, not {count}: delete it or give another "
            "work folder"
        )
    z = data.latents.float().movedim(1, 0).flatten(1)
    deviation, mean = map(_join, torch.std_mean(z, dim=1))
    print(f"{count} latents: mean {mean}; standard deviation {deviation}", flush=True)
    return data


def _join(values: Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.tolist())


def run_diffusion(work: Path, settings: Settings, data: latents.Latents) -> None:
    _check_same(work / "diffusion", settings)
    tokenizer.write(work / "tokenizer")
    words = CLIPTokenizer.from_pretrained(work / "tokenizer")
    fit(work / "diffusion", diffusion.Recipe(_trained_autoencoder(work), data, words), settings)


def run_flow(work: Path, settings: flow.FlowSettings, count: int = LATENTS) -> None:
    _check_same(work / "flow", settings)
    tokenizer.write(work / "flow_tokenizer", flow.POSITIONS)
    words = CLIPTokenizer.from_pretrained(work / "flow_tokenizer")
    start = CLIPTextModel.from_pretrained(DEMO_FOLDER / "text_encoder", local_files_only=True)
    kind: Any = AutoencoderTiny
    narrow = kind.from_pretrained(DEMO_FOLDER / "vae", local_files_only=True)
    vae = flow.spread(narrow)
    data = _latents(vae, work / "flow_latents.safetensors", count, LATENTS_SEED)
    fit(work / "flow", flow.FlowRecipe(vae, data, words, start), settings)


def ship(work: Path, model: str, step: int, to: Path) -> None:
    """Copy the pipeline of a step to a new folder, with nothing in it that is of this machine.

    `model` is "diffusion" or "flow"; `Refused` if there is no such step, or the target exists.
    """
    kept = sorted(int(f.parent.name) for f in (work / model).glob("*/model_index.json"))
    if step not in kept:
        raise Refused(f"no step {step} in {work / model}; there are {kept or 'none'}")
    if to.exists():
        raise Refused(f"{to} exists: remove it first or choose another folder")
    shutil.copytree(work / model / str(step), to)
    # also the two files that transformers 4 reads; its config then names no machine either
    tokenizer.write(to / "tokenizer", flow.POSITIONS if model == "flow" else tokenizer.MAX_LENGTH)
    for file in to.rglob("*config.json"):
        config = json.loads(file.read_text("utf-8"))
        config = {name: value for name, value in config.items() if name not in _MACHINE}
        file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    size = 0
    for file in to.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors are written for their owner alone
            size += file.stat().st_size
    print(f"step {step} -> {to}, {size / 1e6:.1f} MB", flush=True)


def _trained_autoencoder(work: Path) -> AutoencoderTiny:
    folder = work / "autoencoder" / "vae"
    if not (folder / "config.json").is_file():
        raise Refused(f"{folder} does not exist: run the stage `autoencoder` first")
    return AutoencoderTiny.from_pretrained(folder, local_files_only=True).eval()


def _check_same(folder: Path, settings: autoencoder.Settings | Settings) -> None:
    """Refuse to resume with other settings, which would give a model of neither."""
    if not (folder / "state.pt").exists():
        return
    before = torch.load(folder / "state.pt", weights_only=True)["settings"]
    wanted = asdict(settings)
    other = [name for name in wanted if before.get(name) != wanted[name] and name not in _PACE]
    if other:
        differences = ", ".join(f"{name} {before.get(name)} (now {wanted[name]})" for name in other)
        raise Refused(
            f"{folder / 'state.pt'} was made with {differences}: give those settings, or another "
            "folder"
        )


def _add_settings(parser: argparse.ArgumentParser, settings: Any) -> None:
    for field in fields(settings):
        default = getattr(settings, field.name)
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(default), default=default, help=f"default {default}")


def _settings(kind: Any, options: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_pcpo.trainers.demo", description="Make the demo model again."
    )
    stages = parser.add_subparsers(dest="stage", required=True)

    def stage(name: str, what: str) -> argparse.ArgumentParser:
        added = stages.add_parser(name, help=what, description=what)
        added.add_argument("--work", type=Path, required=True, help="the work folder")
        return added

    _add_settings(stage("autoencoder", "train the autoencoder"), autoencoder.Settings())
    added = stage("latents", "draw scenes and encode them once")
    added.add_argument("--count", type=int, default=LATENTS, help=f"default {LATENTS}")
    added.add_argument("--seed", type=int, default=LATENTS_SEED, help=f"default {LATENTS_SEED}")
    added = stage("diffusion", "train text encoder and UNet; each evaluation keeps STEP/")
    added.add_argument("--latents", type=int, default=LATENTS, help=f"default {LATENTS}")
    _add_settings(added, Settings())
    stage("all", "the three stages above with their defaults")
    added = stage("flow", "train the flow model on the shipped model's autoencoder")
    added.add_argument("--latents", type=int, default=LATENTS, help=f"default {LATENTS}")
    _add_settings(added, flow.FlowSettings())
    added = stage("ship", "copy the pipeline of one kept step")
    added.add_argument("--model", choices=["diffusion", "flow"], default="diffusion", help="which")
    added.add_argument("--step", type=int, required=True, help="one of the kept steps")
    added.add_argument("--to", type=Path, required=True, help="a folder that does not exist yet")
    return parser


def _stages(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    work: Path = options.work
    if options.stage == "ship":
        return {"ship": lambda: ship(work, options.model, options.step, options.to)}
    if options.stage == "latents":
        return {"latents": lambda: run_latents(work, options.count, options.seed)}
    if options.stage == "autoencoder":
        chosen = _settings(autoencoder.Settings, options)
        return {"autoencoder": lambda: run_autoencoder(work, chosen)}
    if options.stage == "diffusion":
        chosen = _settings(Settings, options)
        count = options.latents
        return {"diffusion": lambda: run_diffusion(work, chosen, run_latents(work, count))}
    if options.stage == "flow":
        chosen = _settings(flow.FlowSettings, options)
        return {"flow": lambda: run_flow(work, chosen, options.latents)}
    return {
        "autoencoder": lambda: run_autoencoder(work, autoencoder.Settings()),
        "latents": lambda: run_latents(work),
        "diffusion": lambda: run_diffusion(work, Settings(), run_latents(work)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage, or all of them; the exit status is 1 if a stage cannot run."""
    options = _parser().parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    for name, run in _stages(options).items():
        print(f"--- {name}", flush=True)
        began = time.monotonic()
        try:
            run()
        except Refused as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"--- {name}: done in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

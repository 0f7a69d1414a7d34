"""`pcpo sample` and `pcpo export`."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open

from ...pcpo.row_lora import stored_in
from ..config import bounds
from ..config.arguments import Arguments, Word, parse
from ..config.bounds import Batch, Group, Guidance, Seed, Share, Steps
from ..config.sections import Credit, MethodConfig, ModelConfig, Precision, SamplerConfig
from ..config.train_config import ConfigError, validate_stored
from ..families import inspect_source, judge_files, load_family
from ..families.embeds import Embeds
from ..families.files import FIELDS
from ..families.registry import FAMILIES
from ..job.files import write_json
from ..job.folder import JobFolder
from ..job.preflight import files_of, model_source, options_of
from ..job.prompts import prompts_of
from ..lora import adapters as lora
from ..lora.merge import write_merged
from ..lora.safetensors_file import write_safetensors
from ..memory.devices import device_of
from ..reading import check_target, named, no_file, shown
from ..report.images import save_images
from ..report.progress import Progress
from ..run.irg import guide, parse_pair
from ..run.method import DTYPES, credit_of
from ..run.plans import looking_plan
from ..run.sampler import Policy, Request, Sampler, images_at_once
from ..run.setup import collected_messages, latent_shape

# --- sample ----------------------------------------------------------------------------------


MODEL: Any = ModelConfig.model_fields
MODEL_OPTIONS = (
    *FIELDS,
    *("prediction_type", "zero_terminal_snr", "clip_skip", "size_condition"),
)
"""Fields of the config's section `model` that are options of this command."""


class SampleArguments(Arguments):
    """Sample images from a model, with a LoRA or without."""

    model: str = Field(
        default="demo",
        description="'demo', 'demo-flow', a diffusers folder, or one checkpoint file",
    )
    text_encoders: tuple[str, ...] = MODEL["text_encoders"]
    vae: str | None = MODEL["vae"]
    t5_tokenizer: str | None = MODEL["t5_tokenizer"]
    qwen_tokenizer: str | None = MODEL["qwen_tokenizer"]
    lora: str | None = Field(default=None, description="a LoRA file of the same kind of model")
    irg: list[str] = Field(
        default=[],
        description="FILE:GAMMA ...: Implicit Reward Guidance by LoRA files; gamma 0 is the base, 1"
        " the LoRA, above 1 extrapolates",
    )
    share_negative: bool = Field(
        default=False,
        description="with --irg and guidance: only the base predicts the negative prompt; this is "
        "faster, and does not multiply a LoRA's change by the guidance scale",
    )
    prompts: str = Field(
        default="scenes_held_out", description="one prompt, a built-in set, or a file"
    )
    count: Group = Field(default=1, description="images of each prompt")
    limit: int | None = Field(
        default=None, ge=1, le=bounds.IMAGES, description="use the first prompts only"
    )
    steps: Steps = Field(default=10, description="steps of the sampler")
    eta: Share = Field(default=0.0, description="DDIM's noise: 0 is none, 1 DDPM's")
    credit: Credit = Field(
        default="native",
        description="'proportionate' samples as PCPO trains; 'relative', with --lora, as that "
        "credit trains",
    )
    solve_weight: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LARGE,
        description="w of proportionate and published credit, as in training",
    )
    spacing: Literal["model", "leading", "trailing", "linspace"] = Field(
        default="model", description="spacing of the timesteps"
    )
    guidance_scale: Guidance = Field(
        default=1.0, description="scale of classifier-free guidance; 1 means none"
    )
    negative_prompt: str = Field(default="", description="prompt of the unconditional branch")
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = MODEL["prediction_type"]
    zero_terminal_snr: bool | None = MODEL["zero_terminal_snr"]
    clip_skip: int = MODEL["clip_skip"]
    size_condition: tuple[int, ...] = MODEL["size_condition"]
    width: int | None = Field(
        default=None, ge=8, le=bounds.SIDE, description="px; by default the model's own size"
    )
    height: int | None = Field(
        default=None, ge=8, le=bounds.SIDE, description="px; by default the model's own size"
    )
    seed: Seed = Field(default=0, description="base seed; each image has its own stream")
    batch: Batch = Field(
        default=8,
        description="images per forward pass on a GPU, with --irg once more for each LoRA; it "
        "changes images only by rounding. A CPU draws them one by one",
    )
    precision: Precision = Field(default="float32", description="dtype of the network")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    out: str = Field(default="samples", description="folder of the images")
    latents: str | None = Field(
        default=None, description="also write the final latents to this safetensors file"
    )


def sample(arguments: list[str]) -> int:
    """Sample and write 000.png, 001.png, ... and prompts.json."""
    a = parse(SampleArguments, arguments, "pcpo sample")
    pairs = [parse_pair(text) for text in a.irg]
    _check_options(a)
    _check_files(a)
    asked = ModelConfig(source=a.model, **{name: getattr(a, name) for name in MODEL_OPTIONS})
    files = files_of(asked)
    model = inspect_source(files.network)
    if model.kind != "pickle":
        judge_files(files, model)
    prompts = _prompts(a)
    device = device_of(a.device)
    progress = Progress(sys.stdout)
    with collected_messages() as said:
        dtype = DTYPES[a.precision]
        family = load_family(files, dtype=dtype, device=device, **options_of(asked))
        if a.lora is not None:
            lora.load_lora(family.network, a.lora)
    shape = latent_shape(family, a)
    share = credit_of(MethodConfig(credit=a.credit, solve_weight=a.solve_weight))
    points = SamplerConfig(spacing=a.spacing)
    plan = looking_plan(family, shape, a.steps, a.eta, points, share)
    embeds = Embeds.concatenate([family.encode([text]) for text in [*prompts, a.negative_prompt]])
    policy = Policy(family, torch.no_grad, a.guidance_scale, "both", embeds[-1:].to(device))
    if pairs:
        with collected_messages() as more:
            policy = guide(policy, pairs, shares_negative=a.share_negative)
        said += more
    for note in [*said, *_without_effect(a, family.name)]:
        progress.say(note)
    size = images_at_once(a.batch, device)
    base = partial(lora.reference, family.network) if a.credit == "relative" else None
    waiting = embeds[:-1].to("cpu")
    sampler = Sampler(policy, plan.to(device), waiting, shape, size, device, {}, base)
    requests = [
        Request(i, ("sample", a.seed, i, j)) for i in range(len(prompts)) for j in range(a.count)
    ]
    sampled = sampler(requests, progress.bar("sampling", len(requests)))
    progress.say(f"{len(requests)} images in {a.out}")
    files = save_images(sampled.images, Path(a.out))
    listed = {file.name: prompts[r.prompt] for file, r in zip(files, requests, strict=True)}
    write_json(Path(a.out) / "prompts.json", listed)
    if a.latents is not None:
        write_safetensors({"latents": sampled.trajectory.final.cpu()}, a.latents)
    return 0


def _check_options(a: SampleArguments) -> None:
    """Refuse options that contradict each other."""
    if a.irg and a.lora is not None:
        raise ConfigError("give --lora or --irg; --irg FILE:1 is the LoRA itself")
    if a.credit == "relative" and a.lora is None:
        raise ConfigError("--credit relative is a LoRA's relation to its base; give --lora too")
    if a.share_negative and not a.irg:
        raise ConfigError("--share-negative is of --irg; give that too, or leave it out")


def _without_effect(a: SampleArguments, family: str) -> list[str]:
    """Options that change no image, one sentence each."""
    scale = f"--guidance-scale is {a.guidance_scale:g}"
    rules = (
        ("--negative-prompt", a.guidance_scale == 1 and a.negative_prompt != "", scale),
        ("--share-negative", a.guidance_scale == 1 and a.share_negative, scale),
        (
            "--spacing",
            FAMILIES[family].is_flow and a.spacing != "model",
            "the model is a flow model",
        ),
        ("--prompts", a.guidance_scale == 0, f"{scale}, the negative prompt's alone"),
    )
    return [f"{name} has no effect: {why}" for name, is_unread, why in rules if is_unread]


def _prompts(a: SampleArguments) -> tuple[str, ...]:
    """The prompts to sample; `ConfigError` if they are too many."""
    prompts = prompts_of(a.prompts)[: a.limit]
    if len(prompts) * a.count > bounds.IMAGES:
        raise ConfigError(
            f"{len(prompts):,} prompts times --count {a.count} are more than {bounds.IMAGES:,} "
            "images; lower --count or give a --limit"
        )
    return prompts


def _check_files(a: SampleArguments) -> None:
    """Refuse files that are missing or cannot be written, before the model is loaded."""
    if a.lora is not None and (why := no_file(a.lora)):
        raise ConfigError(f"--lora is {shown(a.lora)}, which {why}; check the path")
    check_target(a.out, "--out", is_folder=True)
    if a.latents is not None:
        check_target(a.latents, "--latents", is_folder=False)


# --- export ----------------------------------------------------------------------------------


class ExportArguments(Arguments):
    """Write a run's LoRA to a file of another precision, or merged into a model."""

    run: Word = Field(description="folder of the run")
    out: str = Field(description="the file to write, *.safetensors")
    iteration: int | None = Field(
        default=None, ge=1, le=bounds.ITERATIONS, description="of the export; by default the last"
    )
    precision: Precision = Field(
        default="float16", description="dtype of the LoRA's weights; a merged model keeps its own"
    )
    merge_into: str | None = Field(
        default=None,
        description="a checkpoint file or diffusers folder of the same kind of model as the run's: "
        "write a copy of it with the LoRA merged in",
    )


def export(arguments: list[str]) -> int:
    """Copy an export of a run."""
    a = parse(ExportArguments, arguments, "pcpo export")
    check_target(a.out, "--out", is_folder=a.merge_into is not None and Path(a.merge_into).is_dir())
    there = JobFolder(Path(a.run)).exports()
    if not there:
        raise ConfigError(
            f"{named(a.run)} holds no export; give the folder of a run (with lora/ in it)"
        )
    chosen = max(there) if a.iteration is None else a.iteration
    if chosen not in there:
        raise ConfigError(
            f"iteration {chosen} was not kept; there are {', '.join(map(str, there))}"
        )
    if a.merge_into is not None:
        print(_merged(JobFolder(Path(a.run)), there[chosen], a.merge_into, Path(a.out)))
        return 0
    with safe_open(there[chosen], framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        metadata = file.metadata()
    print(write_safetensors(stored_in(tensors, DTYPES[a.precision]), a.out, metadata))
    return 0


def _merged(run: JobFolder, lora_file: Path, into: str, target: Path) -> Path:
    """A model, read with the run's settings, with one of its LoRAs merged in."""
    model = validate_stored(run.job()["config"], str(run.root / "job.json")).model
    files = replace(files_of(model), network=Path(model_source(into)))
    with collected_messages() as said:
        options = {k: v for k, v in options_of(model).items() if k != "settings"}
        written = write_merged(files, lora_file, target, options)
    for note in said:
        print(note, file=sys.stderr)
    return written

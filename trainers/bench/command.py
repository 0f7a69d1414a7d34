"""`pcpo bench`: how fast this machine samples and updates, on a UNet with random weights.

No checkpoint is needed: time and memory do not depend on the weights. On a CUDA device the inner
loops run under torch's own check for host synchronisation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from pydantic import Field
from torch import Tensor

from ...pcpo import Trajectory
from ...pcpo.trajectory import concatenate
from ..config import bounds
from ..config.arguments import Arguments, parse
from ..config.bounds import Guidance, Images, Rank, Steps
from ..config.sections import Precision, SamplerConfig
from ..config.train_config import ConfigError, TrainConfig
from ..families.embeds import Embeds
from ..families.registry import FAMILIES
from ..families.sd1.model import StableDiffusion
from ..lora import adapters
from ..memory.devices import device_label, device_of
from ..run.method import DTYPES, objective_of, selection_of
from ..run.plans import plans_of
from ..run.sampler import Policy, Request, Sampler
from ..run.update.two_pass import (
    Batch,
    Objective,
    Pairs,
    accumulate,
    check_on_policy,
    chosen_pairs,
)
from .model import random_network
from .suite import run_suite


class BenchArguments(Arguments):
    """Measure rollout and update on this machine, with random weights."""

    size: Literal["sd15", "tiny"] = Field(default="sd15", description="size of the UNet")
    precision: Precision = Field(default="bfloat16", description="dtype of the network")
    px: int = Field(
        default=512, ge=64, le=bounds.SIDE, multiple_of=64, description="side of an image"
    )
    steps: Steps = Field(default=50, description="steps of the sampler")
    guidance_scale: Guidance = Field(default=5.0, description="scale of classifier-free guidance")
    rank: Rank = Field(default=4, description="rank of the LoRA")
    micro_batch: bounds.Batch = Field(default=8, description="images per forward pass")
    images: Images = Field(default=16, description="number of images to sample and train")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    suite: bool = Field(
        default=False,
        description="measure all families at the sizes that people train, in place of one UNet; "
        "of the other options only size, device, minutes and json count",
    )
    minutes: float = Field(
        default=12, gt=0, le=1440, description="after which the suite begins no further case"
    )
    json_file: Annotated[str | None, "--json"] = Field(
        default=None,
        description="file for the suite's numbers; one of before is continued",
    )


def random_family(size: str, dtype: torch.dtype, device: torch.device) -> StableDiffusion:
    """An SD1.x model with random weights, a small autoencoder and no text encoder."""
    spec = FAMILIES[StableDiffusion.name]
    torch.manual_seed(0)
    network = random_network(spec, dtype, device, device, is_tiny=size == "tiny")
    vae: Any = AutoencoderTiny()
    return spec.part("costs").model_of(network, vae.to(device), dtype)


@contextlib.contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Make any CUDA operation that waits for the device raise within it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def seconds_of(device: torch.device, started: float) -> float:
    """Seconds since `started`, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    """Measure and print."""
    a = parse(BenchArguments, arguments, "pcpo bench")
    if a.json_file is not None and not a.suite:
        raise ConfigError("--json keeps the numbers of the suite; add --suite, or leave it out")
    if a.suite:
        run_suite(a.device, a.minutes, a.json_file, is_tiny=a.size == "tiny")
        return 0
    device = device_of(a.device)
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[a.precision]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
    family = random_family(a.size, DTYPES[a.precision], device)
    width = family.network.config.cross_attention_dim
    adapters.add_lora(family.network, a.rank, a.rank, family.lora_targets, seed=0)
    sampler_config = SamplerConfig(steps=a.steps, guidance_scale=a.guidance_scale)
    config = TrainConfig(sampler=sampler_config)
    shape = (4, a.px // 8, a.px // 8)
    plan = plans_of(config, family, shape).stochastic.to(device)
    embeds = Embeds(torch.randn(2, 77, width, generator=torch.Generator().manual_seed(0)))
    policy = Policy(family, accelerator.autocast, a.guidance_scale, "both", embeds[1:].to(device))
    sampler = Sampler(policy, plan, embeds[:1], shape, a.micro_batch, device, {})
    objective = Objective(policy, config.method, objective_of(config.method))
    requests = [Request(0, ("bench", i)) for i in range(a.images)]
    where = device_label(device)
    print(f"{where}: {a.size} UNet, {a.precision}, LoRA rank {a.rank}, {a.px} px, {a.steps} steps,")
    print(f"guidance {a.guidance_scale:g}, micro-batch {a.micro_batch}, {a.images} images")

    sampler(requests[: a.micro_batch])  # warm up: kernels are chosen and memory is taken
    trajectory, seconds = _rollout(sampler, requests, device)
    print(f"rollout  {a.images / seconds:8.3f} images/s  {seconds:.1f} s{_memory(device)}")
    advantages = torch.randn(a.images, generator=torch.Generator().manual_seed(1)).to(device)
    rows = embeds[:1].expand(a.images).to(device)
    batch = Batch(trajectory, rows, advantages, plan)
    worst = check_on_policy(objective, batch, a.micro_batch)
    seconds = _update(
        objective,
        batch,
        requests,
        a.micro_batch,
        accelerator,
        selection_of(config.method, config.run.seed),
    )
    print(f"update   {a.images / seconds:8.3f} images/s  {seconds:.1f} s{_memory(device)}")
    print(f"on policy |log ratio| {worst:.2e}")
    checked = "none (checked)" if device.type == "cuda" else "not checked: no CUDA device"
    print(f"host synchronisations in the inner loops: {checked}")
    return 0


def _rollout(
    sampler: Sampler, requests: list[Request], device: torch.device
) -> tuple[Trajectory, float]:
    """Sample all images without decoding them, which would read them back."""
    started, parts, size = time.perf_counter(), [], sampler.micro_batch
    with no_host_sync(device):
        for first in range(0, len(requests), size):
            batch = requests[first : first + size]
            parts.append(sampler.rollout(batch + batch[-1:] * (size - len(batch)))[: len(batch)])
    return concatenate(parts), seconds_of(device, started)


def _update(
    objective: Objective,
    batch: Batch,
    requests: list[Request],
    micro_batch: int,
    accelerator: Accelerator,
    selection: Any,
) -> float:
    """Gradients of all (image, step) pairs."""
    rows = [(i, request.key) for i, request in enumerate(requests)]
    chosen = chosen_pairs(rows, len(batch.trajectory.step), selection)
    pairs = Pairs.of(chosen, micro_batch, batch.trajectory.final.device)
    device = batch.trajectory.final.device

    def backward(loss: Tensor) -> None:
        accelerator.backward(loss)

    started = time.perf_counter()
    with no_host_sync(device):
        accumulate(objective, batch, pairs, len(chosen), micro_batch, backward)
    return seconds_of(device, started)


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f"  peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"

"""Memory, speed and exactness of training SD3.5-M and FLUX.1-dev on a GPU, with random weights.

    python tests/benchmarks/flow_memory.py --model flux --side 512 720 --rank 32 128 --out flux.json
    python tests/benchmarks/flow_memory.py --model sd35 --out sd35.json
    python tests/benchmarks/flow_memory.py --model flux --fast --base same --out flux_fast.json

No checkpoint is needed: time and memory do not depend on what the weights are. The settings are
those of `sd35-16gb` and `flux-24gb`, with fewer images; `--fast` keeps the base whole and computes
nothing again. Of each case it writes the peak memory of each stage beside what `pcpo train
--dry-run` estimates, seconds by stage, the on-policy |log ratio|, and the share of the measured
peak of a bfloat16 matrix product that rollout and update reach. `--tiny` tests the script itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures.iteration_fixture import one_iteration
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset
from comfyui_pcpo.trainers.estimate.memory import estimate
from comfyui_pcpo.trainers.estimate.network_costs import network_for
from comfyui_pcpo.trainers.families.embeds import Embeds, SharedEmbeds
from comfyui_pcpo.trainers.families.flow import FlowSchedule
from comfyui_pcpo.trainers.families.flux.model import Flux
from comfyui_pcpo.trainers.families.sd3.model import StableDiffusion3
from comfyui_pcpo.trainers.families.source import read_config
from comfyui_pcpo.trainers.job.prompts import PromptSplit
from comfyui_pcpo.trainers.profile.watch import product_rate
from comfyui_pcpo.trainers.run import setup as prepare
from comfyui_pcpo.trainers.run.conditioning import Conditioning
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel

GIB = 2**30
FAMILIES = Path(prepare.__file__).parents[1] / "families"
PRESETS = {"flux": "flux-24gb", "sd35": "sd35-16gb"}
TINY = {
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "sd35": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    | {"dual_attention_layers": [0]},
}
NARROW = {"joint_attention_dim": 32, "pooled_projection_dim": 16}


def random_family(model: str, is_tiny: bool, device: torch.device) -> Any:
    """A model of the published size without text encoders, its weights drawn on the device."""
    name = "flux" if model == "flux" else "sd3"
    config = read_config(FAMILIES / name / "configs" / "transformer" / "config.json")
    vae_config = read_config(FAMILIES / name / "configs" / "vae" / "config.json")
    if is_tiny:
        config |= TINY[model] | NARROW
        vae_config["block_out_channels"] = [32, 32, 32, 32]
    kind: Any = FluxTransformer2DModel if model == "flux" else SD3Transformer2DModel
    autoencoder: Any = AutoencoderKL
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        transformer = kind.from_config(config)
        torch.set_default_dtype(torch.float32)
        vae = autoencoder.from_config(vae_config)
    schedule = FlowSchedule(is_dynamic=model == "flux")
    if model == "flux":
        return Flux(transformer, vae, None, None, schedule, torch.bfloat16)
    return StableDiffusion3(transformer, vae, None, schedule, torch.bfloat16)


def config_of(a: argparse.Namespace, side: int, rank: int, base: str) -> TrainConfig:
    """The preset with the case's changes."""
    values = read_preset(PRESETS[a.model]).model_dump(mode="json")
    values["model"] |= {"width": side, "height": side, "base": base}
    values["trainable"] |= {"rank": rank, "alpha": float(rank)}
    values["prompts"] |= {"per_iteration": 1, "images_per_prompt": a.images}
    values["optimizer"] |= {"updates": 1, "kind": a.optimizer}
    values["run"] |= {"iterations": a.iterations, "eval_prompts": 0, "device": a.device}
    if a.micro_batch:
        values["run"]["micro_batch"] = a.micro_batch
    if a.steps:
        values["sampler"]["steps"] = a.steps
    if a.fast:
        values["model"] |= {"gradient_checkpointing": False, "offload": "never"}
        values["run"]["store_on"] = "device"
    elif a.device == "cuda":  # as on a small card, whatever card this is
        values["model"]["offload"], values["run"]["store_on"] = "always", "cpu"
    return TrainConfig.model_validate(values)


def set_up(a: argparse.Namespace, config: TrainConfig, device: torch.device) -> Any:
    """A run of random weights, prepared as every other."""
    family = random_family(a.model, a.tiny, device)
    tokens = 16 if a.tiny else 512 if a.model == "flux" else 333
    width = family.transformer.config.joint_attention_dim
    pooled = family.transformer.config.pooled_projection_dim
    draw = torch.Generator().manual_seed(0)
    table = Embeds(
        torch.randn(2, tokens, width, generator=draw), torch.randn(2, pooled, generator=draw)
    ).to(torch.bfloat16)
    own: dict[str, Any] = {
        "preflight": lambda config, **options: None,
        "split_prompts": lambda config, count: PromptSplit(("a prompt",), ()),
        "load_family": lambda *given, **options: family,
        "load_conditioning": lambda *given: Conditioning(
            SharedEmbeds(table[:1], torch.tensor([0])), table[1:]
        ),
    }
    kept = {name: getattr(prepare, name) for name in own}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for name, value in own.items():
            setattr(prepare, name, value)
        return prepare.prepare(config)
    finally:
        for name, value in kept.items():
            setattr(prepare, name, value)


class Peaks:
    """The largest memory of each stage; zeros on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda, self.found = device.type == "cuda", dict[str, float]()

    def end(self, stage: str) -> None:
        """A stage ends; the next begins."""
        peak = torch.cuda.max_memory_reserved() if self.is_cuda else 0
        self.found[stage] = max(self.found.get(stage, 0.0), peak / GIB)
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def watch(family: Any, peaks: Peaks, seconds: dict[str, float], device: torch.device) -> None:
    """Tell decoding from sampling."""
    decode = family.decode

    def watched(*given: Any, **options: Any) -> Any:
        synchronize(device)
        peaks.end("rollout")
        started = time.perf_counter()
        images = decode(*given, **options)
        synchronize(device)
        seconds["decode"] = seconds.get("decode", 0.0) + time.perf_counter() - started
        peaks.end("decode")
        return images

    family.decode = watched


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(a: argparse.Namespace, config: TrainConfig, peak_flops: float) -> dict[str, Any]:
    """One case."""
    device = torch.device(a.device)
    setup = set_up(a, config, device)
    peaks, seconds = Peaks(device), dict[str, float]()
    watch(setup.family, peaks, seconds, device)
    peaks.end("load")
    for number in range(config.run.iterations):  # the last is measured: kernels are chosen by then
        seconds.clear()
        line = one_iteration(setup, number)
        synchronize(device)
        peaks.end("update")
    seconds |= {"rollout": line["seconds_rollout"] - seconds["decode"]}
    seconds |= {"update": line["seconds_update"], "iteration": line["seconds"]}
    found = {
        **{"model": a.model, "side": config.model.width, "rank": config.trainable.rank},
        **{"base": config.model.base, "micro_batch": config.run.micro_batch},
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "optimizer": config.optimizer.kind,
        "images": config.images,
        "steps": config.sampler.steps,
        "peak_gib": peaks.found,
        "seconds": seconds,
        "log_ratio_max_on_policy": line["log_ratio_max_on_policy"],
    }
    if not a.tiny:
        values = config.model_dump(mode="json")
        known = network_for(config.model.source)
        expected = estimate(values, known, torch.cuda.get_device_properties(0).total_memory)
        found["estimated_gib"] = {s.name: s.total / GIB for s in expected.stages}
        reached = {name: expected.work[name] / seconds[name] for name in ("rollout", "update")}
        found["tflops"] = {name: rate / 1e12 for name, rate in reached.items()}
        found["share_of_peak"] = {name: rate / peak_flops for name, rate in reached.items()}
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(PRESETS), default="flux")
    parser.add_argument("--side", type=int, nargs="+", default=[512])
    parser.add_argument("--rank", type=int, nargs="+", default=[32])
    parser.add_argument("--base", nargs="+", default=["fp8"])
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--steps", type=int, help="of the sampler; the preset's where not given")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--fast", action="store_true", help="nothing is computed again or moved")
    parser.add_argument("--tiny", action="store_true", help="a test of this script on a CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure all cases; the file is written after each."""
    a = arguments(words)
    device = torch.device(a.device)
    peak = product_rate(device, torch.bfloat16, time.perf_counter)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__}
    report |= {"matmul_tflops": peak / 1e12, "cases": []}
    for side, rank, base in product(a.side, a.rank, a.base):
        try:
            found = measured(a, config_of(a, side, rank, base), peak)
        except torch.cuda.OutOfMemoryError as error:
            found = {"side": side, "rank": rank, "base": base, "error": str(error)}
        report["cases"].append(found)
        a.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

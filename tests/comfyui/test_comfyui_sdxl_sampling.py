"""The sampling nodes on tiny SDXL models in real ComfyUI: the trainer's network, grid and latents.

What it needs is in comfyui_fixture.py, tiny SDXL files among it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_fixture import MODELS, PACK, in_comfyui, needs_host, needs_models, report_in
from comfyui_pcpo.pcpo import Ddim, noise_streams, plan_diffusion, rollout
from comfyui_pcpo.pcpo.credit import Proportionate
from comfyui_pcpo.registry import CREDITS
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.run.plans import diffusion_grid
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_sdxl_sampling_fixture.py"
FILES = {"epsilon": "tiny_sdxl.ckpt", "zero SNR": "tiny_sdxl_vpred_zsnr.ckpt"}
SIGNAL = 4.8973451890853435e-08**0.5
"""What ComfyUI takes for the signal in pure noise."""

PLANS = {
    f"{credit} {eta:g}": {
        "credit": credit,
        "eta": eta,
        "guidance": guidance,
        "steps": steps,
        "seed": seed,
    }
    for credit, eta, guidance, steps, seed in (
        ("native", 1.0, 1.0, 6, 1),
        ("native", 0.5, 4.0, 5, 2),
        ("proportionate", 1.0, 4.0, 8, 3),
    )
}

pytestmark = [needs_host, needs_models(*(f"checkpoints/{file}" for file in FILES.values()))]


@pytest.fixture(scope="module", params=FILES)
def made(request, tmp_path_factory) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """The trainer's model of a file, what ComfyUI has sampled with it, and its report."""
    file, folder = MODELS / "checkpoints" / FILES[request.param], tmp_path_factory.mktemp("sdxl")
    (folder / "plans.json").write_text(json.dumps(PLANS))
    arguments = (PACK, file, folder / "plans.json", folder / "out.safetensors")
    report = report_in(in_comfyui(SCRIPT, *arguments, seconds=600))
    network = Files(file, (MODELS / "checkpoints" / FILES["epsilon"],))  # which has text encoders
    return load_family(network, parts="network"), load_file(folder / "out.safetensors"), report


def is_zero_snr(family: Any) -> bool:
    return family.schedule.rescale_betas_zero_snr


@pytest.mark.parametrize("name", PLANS)
def test_latents_are_the_trainers(made, name):
    family, tensors, _ = made
    plan = PLANS[name]
    grid = diffusion_grid(family.schedule, plan["steps"], "leading")
    assert (grid.alpha_bar[0] == 0) == is_zero_snr(family)
    positive, negative = (
        Embeds(tensors[tokens], tensors[pooled]).expand(2)
        for tokens, pooled in (("positive", "pooled"), ("negative", "negative pooled"))
    )

    def denoiser(x, timestep):
        yes, no = (family.predict(x.float(), timestep, embeds) for embeds in (positive, negative))
        prediction = (no + plan["guidance"] * (yes - no)).double()
        if is_zero_snr(family) and timestep == 999:  # whose x0 is -v, and in ComfyUI has some noise
            return (1 - SIGNAL**2) ** 0.5 * prediction - SIGNAL * x
        return prediction

    compiled = plan_diffusion(
        grid,
        Ddim(plan["eta"]),
        CREDITS[plan["credit"]](),
        prediction_type=family.schedule.prediction_type,
    )
    keys = [("sample", plan["seed"], 0, image) for image in range(2)]
    noise = noise_streams(keys, plan["steps"], (4, 8, 12)).double()
    with torch.no_grad():
        expected = rollout(denoiser, compiled, noise).final.float()
    error = ((tensors[name] - expected).abs().max() / expected.abs().max()).item()
    print(f"\nMEASURED {name}: {error:.1e} of {expected.abs().max():.2f}")
    # alpha_bar of both agrees to 4e-7, and is small where a schedule ends in noise
    assert error < (5e-4 if is_zero_snr(family) else 1e-4) and expected.std() > 0.1


def test_guidance_by_two_loras_is_the_sum_of_both(made):
    _, tensors, _ = made
    change = (tensors["led"] - tensors["base"]).abs().max()
    assert change > 1e-2 and tensors["led"].isfinite().all()
    scale = tensors["one step"].abs().max()
    error = (tensors["one step"] - tensors["one step summed"]).abs().max() / scale
    print(f"\nMEASURED guidance: {error:.1e} of {scale:.2f}")
    assert error < 1e-4


def test_relative_credit_is_sampled(made):
    _, tensors, _ = made
    assert tensors["relative"].isfinite().all()
    assert (tensors["relative"] - tensors["plainly"]).abs().max() > 1e-2


def test_the_weights_are_the_trainers(made):
    family, _, report = made
    grid = diffusion_grid(family.schedule, 20, "leading")
    kind = family.schedule.prediction_type
    credit = Proportionate()(grid, Ddim(), torch.ones(20, dtype=torch.bool))
    rows = [line.split() for line in report["table"].splitlines()[2:22]]
    found = torch.tensor([float(row[3]) for row in rows]).double()
    first = 1 if is_zero_snr(family) else 0
    torch.testing.assert_close(found[first:], credit.credit[first:], rtol=1e-4, atol=1e-6)
    if is_zero_snr(family):
        plan = plan_diffusion(grid, Ddim(), Proportionate(), prediction_type=kind)
        assert f"infinite in eps, {plan.credit[0]:.6f} in v" in report["table"]
        assert report["first sigma"] > 4518

"""The sampling nodes on Z-Image and FLUX.2 [klein] in real ComfyUI: the trainer's grid and latents.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_fixture import (
    MODELS,
    PACK,
    in_comfyui,
    needs_host,
    needs_models,
    relative_error,
    report_in,
)
from comfyui_pcpo.pcpo import TRANSITIONS, FlowSde, noise_streams, plan_flow, rollout
from comfyui_pcpo.pcpo.credit import Native, Proportionate
from comfyui_pcpo.pcpo.plan import deterministic, step_set
from comfyui_pcpo.registry import CREDITS
from comfyui_pcpo.tests.fixtures import host_files_fixture as files
from comfyui_pcpo.trainers.families import Files, load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.run.plans import sigma_grid
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_qwen_sampling_fixture.py"
AUTOENCODER = "vae/tiny_ae16.safetensors"
SHAPES = {"zimage": (16, 8, 12), "klein": (128, 4, 6)}
SHIFTS = {"zimage": 4.0, "klein": None}
"""Of a ModelSamplingAuraFlow node; klein's is the published function of size and steps."""
STEPS = 8
"""Of the table of weights."""

PLANS = {
    f"{transition} {noise:g} {credit} cfg {guidance:g}": {
        "transition": transition,
        "noise": noise,
        "credit": credit,
        "guidance": guidance,
        "steps": steps,
        "seed": seed,
    }
    for transition, noise, credit, guidance, steps, seed in (
        ("auto", 0.7, "native", 1.0, 6, 1),
        ("flow_sde", 0.4, "proportionate", 4.0, 5, 2),
        ("dance_sde", 0.3, "native", 4.0, 4, 3),
        ("cps", 0.8, "native", 2.5, 6, 4),
        ("flow_sde", 0.0, "native", 4.0, 4, 5),
    )
}

pytestmark = [needs_host, needs_models(AUTOENCODER)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    files.write_files(folder)
    (folder / AUTOENCODER).symlink_to(MODELS / AUTOENCODER)
    return folder


@pytest.fixture(scope="module", params=SHAPES)
def made(request, models, tmp_path_factory) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """The trainer's model, what ComfyUI has sampled with it, and its report."""
    name, folder = request.param, tmp_path_factory.mktemp("sampled")
    network, vae = {"zimage": (files.ZIMAGE, AUTOENCODER), "klein": (files.KLEIN, files.VAE)}[name]
    (folder / "plans.json").write_text(json.dumps(PLANS))
    arguments = (name, models / network, folder / "plans.json", folder / "out.safetensors")
    report = report_in(in_comfyui(SCRIPT, PACK, *arguments, seconds=600))
    given = Files(models / network, (models / files.QWEN,), models / vae)
    return load_family(given, parts="network"), load_file(folder / "out.safetensors"), report


def embeds_of(family: Any, tokens: torch.Tensor) -> Embeds:
    found = Embeds(tokens) if family.name == "klein" else Embeds.from_rows([""], [tokens[0]])
    return found.expand(2)


@pytest.mark.parametrize("name", PLANS)
def test_latents_are_the_trainers(made, name):
    family, tensors, _ = made
    plan, shape = PLANS[name], SHAPES[family.name]
    grid = sigma_grid(family.schedule, shape, plan["steps"], "inverse_count", SHIFTS[family.name])
    expected = torch.cat([grid.sigmas.float(), torch.zeros(1)])[: plan["steps"] + 1]
    torch.testing.assert_close(tensors[f"{name} sigmas"], expected, rtol=0, atol=1e-6)
    positive, negative = (embeds_of(family, tensors[key]) for key in ("positive", "negative"))

    def denoiser(x, sigma):
        yes, no = (family.predict(x.float(), sigma, embeds) for embeds in (positive, negative))
        return (no + plan["guidance"] * (yes - no)).double()

    kind = "flow_sde" if plan["transition"] == "auto" else plan["transition"]
    transition = TRANSITIONS[kind](plan["noise"]) if plan["noise"] else FlowSde()
    compiled = plan_flow(grid, transition, CREDITS[plan["credit"]](), drop_last=1)
    quiet, last = deterministic(compiled, grid, transition), plan["steps"] - 1
    for column in ("mean_x", "mean_p", "std"):  # noise at the end would not be removed again
        place = slice(0 if plan["noise"] == 0 else last, None)
        getattr(compiled, column)[place] = getattr(quiet, column)[place]
    keys = [("sample", plan["seed"], 0, image) for image in range(2)]
    noise = noise_streams(keys, plan["steps"], shape).double()
    with torch.no_grad():
        final = rollout(denoiser, compiled, noise).final.float()
    error = relative_error(tensors[name], final)
    print(f"\nMEASURED {family.name} {name}: {error:.1e} of {final.abs().max():.2f}")
    assert error < 5e-5 and final.std() > 0.1


def test_guidance_by_two_loras_is_the_sum_of_both(made):
    family, tensors, report = made
    base, led, summed = (tensors[f"one step{end}"] for end in (" base", "", " summed"))
    assert relative_error(led, base) > 1e-3
    error = relative_error(led, summed)
    print(f"\nMEASURED {family.name} guidance: {error:.1e}, {report['beside']} beside")
    assert error < 1e-4 and report["beside"] == 0


def test_the_weights_are_the_trainers(made):
    family, _, report = made
    shape = SHAPES[family.name]
    grid = sigma_grid(family.schedule, shape, STEPS, "inverse_count", SHIFTS[family.name])
    over = step_set(STEPS, 1)
    rows = [line.split() for line in report["table"].splitlines()[2 : 2 + STEPS]]
    for column, rule in ((2, Native()), (3, Proportionate())):
        expected = rule(grid, FlowSde(), over).credit[:-1]
        found = torch.tensor([float(row[column]) for row in rows[:-1]]).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

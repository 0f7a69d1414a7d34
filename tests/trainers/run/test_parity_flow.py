"""One trained step of FLUX and of SD3.5 in float32, as DanceGRPO and Flow-GRPO have it.

The expected side calls diffusers' networks itself and puts the step, the densities, the ratio, the
KL and the loss together from BASELINES B3 and B4 and METHOD M2 to M6 in float64.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture, sd3_fixture
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.run.iteration import requests_of
from comfyui_pcpo.trainers.run.setup import Setup, prepare
from comfyui_pcpo.trainers.run.update.two_pass import Batch, Pairs
from diffusers import FluxPipeline
from torch import Tensor

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
ADVANTAGES = torch.tensor([1.5, -0.5])
PIXELS, LATENT = 64, (2, 16, 8, 8)


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    (made / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    return {
        "flux": flux_fixture.write_folder(made / "flux"),
        "sd3": sd3_fixture.write_folder(made / "sd3"),
        "prompts": made / "prompts.txt",
    }


def setting(name: str, model: Path, prompts: Path) -> Setup:
    """A setting of the paper on a tiny model in float32, with two images an iteration."""
    changes = {
        "model": {"source": str(model), "width": PIXELS, "height": PIXELS, "precision": "float32"},
        "trainable": {"rank": 4, "alpha": 8.0},
        "prompts": {"source": str(prompts), "per_iteration": 1, "images_per_prompt": 2},
        "method": {"clip_low": CLIP, "clip_high": CLIP},
        "optimizer": {"updates": 1},
        "run": {"micro_batch": 2, "device": "cpu"},
    }
    values = read_preset(name).model_dump()
    for section, fields in changes.items():
        values[section] |= fields
    values["rewards"] = {"jpeg_incompressibility": 1.0}
    values["model"]["gradient_checkpointing"] = False
    return prepare(TrainConfig.model_validate(values))


def moved(setup: Setup, seed: int, size: float) -> None:
    """Move the adapters, as an update does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in setup.learner.parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def flux_velocity(network, setup: Setup, x: Tensor, sigma: float) -> Tensor:
    """FLUX's own call: packed latents, int(1000 sigma) / 1000, guidance 3.5."""
    embeds = setup.sampler.embeds[[0, 0]]
    packed = network(
        hidden_states=FluxPipeline._pack_latents(x, *LATENT),
        timestep=torch.full((2,), int(1000 * sigma) / 1000),
        guidance=torch.full((2,), 3.5),
        encoder_hidden_states=embeds.tokens,
        pooled_projections=embeds.pooled,
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        txt_ids=torch.zeros(embeds.tokens.shape[1], 3),
    ).sample
    return FluxPipeline._unpack_latents(packed, PIXELS, PIXELS, 8)


def sd3_velocity(network, setup: Setup, x: Tensor, sigma: float) -> Tensor:
    """SD3's own calls with guidance 4.5, the unconditional one without gradient."""
    timestep = torch.full((2,), sigma) * 1000

    def branch(embeds):
        tokens, pooled = embeds.tokens, embeds.pooled
        return network(x, tokens, pooled, timestep).sample

    with torch.no_grad():
        unconditional = branch(setup.objective.policy.negative.expand(2))
    conditional = branch(setup.sampler.embeds[[0, 0]])
    return unconditional + 4.5 * (conditional - unconditional)


def dance_sigmas(steps: int) -> np.ndarray:
    even = np.linspace(1, 0, steps + 1)
    return 3 * even / (1 + 2 * even)


def flow_sigmas(steps: int) -> np.ndarray:
    even = np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), steps)
    return np.append(3 * even / (1 + 2 * even), 0)


def dance_step(sigmas, i, x, v):
    """B3: mean, standard deviation and g; x0 = x - sigma v."""
    s, step = sigmas[i], sigmas[i + 1] - sigmas[i]
    mean = x + v * step + 0.5 * 0.3**2 * (x - (1 - s) * (x - s * v)) / s**2 * step
    return mean, 0.3 * math.sqrt(-step), 0.3


def flow_step(sigmas, i, x, v):
    """B4: mean, standard deviation and std_dev."""
    s, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    std_dev = 0.7 * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
    pull = std_dev**2 / (2 * s) * dt
    return x * (1 + pull) + v * (dt + pull * (1 - s)), std_dev * math.sqrt(-dt), std_dev


MODELS = {
    "flux": (flux_velocity, dance_sigmas(12), dance_step),
    "sd3": (sd3_velocity, flow_sigmas(10), flow_step),
}
MOVES = {"flux": 1e-2, "sd3": 1e-3}
CLIP = 0.05  # so wide that both images keep their gradients


def average(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """B3, B4: the full Gaussian, averaged over the latent."""
    return average(-((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi))


def zeta(family: str) -> float:
    """M4: the native weights' sum over that of the intervals, without the last step."""
    _, sigmas, step = MODELS[family]
    at, delta = sigmas[:-2], -np.diff(sigmas)[:-1]
    g = np.array([step(sigmas, i, 0.0, 0.0)[2] for i in range(len(at))])
    return float((np.sqrt(delta) / g * (1 + (1 - at) * g**2 / (2 * at))).sum() / delta.sum())


def expected_loss(log_ratio: Tensor, is_pcpo: bool) -> Tensor:
    """M2: PPO's clip of the baselines, or the log-hinge."""
    a = ADVANTAGES.double()
    if is_pcpo:
        return (a.abs() * (CLIP - a.sign() * log_ratio).clamp(min=0)).mean()
    rho = log_ratio.exp()
    return torch.maximum(-a * rho, -a * rho.clamp(1 - CLIP, 1 + CLIP)).mean()


def gradients(setup: Setup, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, setup.learner.parameters)
    return torch.cat([gradient.flatten().double() for gradient in found])


@pytest.mark.parametrize(
    ("name", "family", "steps"),
    [
        ("flux-hpsv21-dancegrpo", "flux", (0, 3, 10)),
        ("flux-hpsv21", "flux", (3,)),
        ("sd35-ocr-flowgrpo", "sd3", (0, 4, 8)),
        ("sd35-ocr", "sd3", (4,)),
    ],
)
def test_a_step_its_ratio_kl_and_loss(folders, name, family, steps):
    setup = setting(name, folders[family], folders["prompts"])
    is_pcpo, beta = not name.endswith("grpo"), setup.config.method.kl_weight
    velocity, sigmas, step = MODELS[family]
    base = load_family(folders[family]).network  # the reference: a model without adapters
    moved(setup, 1, 0.15)
    plan = setup.plans.at(0)
    trajectory = setup.sampler.rollout(requests_of(setup.config, len(setup.prompts), 0))
    network, latents = setup.family.network, trajectory.x
    with torch.no_grad():
        old = {i: velocity(network, setup, latents[:, i], sigmas[i]).double() for i in steps}
        reference = {i: velocity(base, setup, latents[:, i], sigmas[i]).double() for i in steps}
    moved(setup, 2, MOVES[family])
    batch, largest = (
        Batch(trajectory, setup.sampler.embeds[[0, 0]], ADVANTAGES, plan.to("cpu")),
        0.0,
    )
    for i in steps:
        x, noise = latents[:, i].double(), trajectory.noise[:, i].double()
        old_mean, std, g = step(sigmas, i, x, old[i])
        x_next = old_mean + std * noise
        if i + 1 < latents.shape[1]:
            torch.testing.assert_close(latents[:, i + 1].double(), x_next, **CLOSE)
        new = velocity(network, setup, latents[:, i], sigmas[i]).double()
        mean, _, _ = step(sigmas, i, x, new)
        if is_pcpo:
            change = zeta(family) * (sigmas[i] - sigmas[i + 1]) * (new - old[i])
            log_ratio = -average(change * noise + change**2 / 2)
        else:
            log_ratio = density(x_next, mean, std) - density(x_next, old_mean, std)
        reference_mean, _, _ = step(sigmas, i, x, reference[i])
        kl = average((mean - reference_mean) ** 2) / (2 * g**2)  # B4: without the interval
        loss = expected_loss(log_ratio, is_pcpo) + beta * kl.mean()

        pairs = Pairs.of([(0, i), (1, i)], 2, torch.device("cpu"))
        found, _, _ = setup.objective.log_ratio(batch, pairs)
        torch.testing.assert_close(found.double(), log_ratio, **CLOSE)
        largest = max(largest, log_ratio.abs().max().item())
        ours, sums = setup.objective.loss(batch, pairs, total=2)
        torch.testing.assert_close(ours.double(), loss, **CLOSE)
        if beta:
            assert sums[7].item() / 2 == pytest.approx(kl.mean().item(), rel=1e-6, abs=1e-6)
            assert kl.min() > 1e-6
        exact = gradients(setup, loss)
        difference = (gradients(setup, ours) - exact).norm()
        assert exact.norm() > 0 and difference < 1e-4 * exact.norm()
    assert largest > 1e-5


def test_one_image_trains_the_share_of_steps_that_dancegrpo_trains(folders):
    setup = setting("flux-hpsv21-dancegrpo", folders["flux"], folders["prompts"])
    request = requests_of(setup.config, len(setup.prompts), 0)
    chosen = setup.learner.selection(11, torch.Generator().manual_seed(0))
    assert len(chosen) == len(set(chosen.tolist())) == int(11 * 0.6) == 6
    assert request[0].initial == request[1].initial is not None  # one initial noise a prompt
    told = setup.plans.stochastic.timesteps.tolist()
    assert told == [int(1000 * s) / 1000 for s in dance_sigmas(12)[:-1]]

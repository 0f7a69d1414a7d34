"""Gradients kept apart by sample, against one backward pass a sample in float64."""

from __future__ import annotations

import pytest
import torch
from comfyui_pcpo.pcpo import (
    OBJECTIVES,
    RATIOS,
    Cps,
    Ddim,
    FlowSde,
    ddim_grid,
    flow_grid,
    plan_diffusion,
    plan_flow,
)
from comfyui_pcpo.pcpo.credit import Native, Proportionate
from comfyui_pcpo.pcpo.objectives import ClipRange, slope_on_policy
from comfyui_pcpo.pcpo.per_sample import SampleGradients, weighted_sum
from comfyui_pcpo.pcpo.rollout import rollout, rollout_with_gradient
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYERS = {
    "linear": (nn.Linear(5, 3, bias=False), (6, 7, 5)),
    "wide linear": (nn.Linear(3, 5, bias=False), (6, 7, 3)),
    "linear on vectors": (nn.Linear(5, 3, bias=False), (6, 5)),
    "linear on pictures": (nn.Linear(5, 3, bias=False), (6, 2, 4, 5)),
    "convolution": (nn.Conv2d(3, 2, 3, padding=1, bias=False), (6, 3, 5, 4)),
    "strided": (nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), (6, 3, 6, 5)),
    "wide strided": (nn.Conv2d(1, 7, 2, stride=2, bias=False), (6, 1, 6, 4)),
    "dilated": (nn.Conv2d(3, 2, (3, 1), dilation=2, padding=(2, 0), bias=False), (6, 3, 7, 5)),
    "padded wide": (nn.Conv2d(3, 2, (1, 3), padding=(1, 2), bias=False), (6, 3, 4, 5)),
    "1 x 1": (nn.Conv2d(3, 2, 1, bias=False), (6, 3, 5, 4)),
}


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def values(y: torch.Tensor) -> torch.Tensor:
    """One number a row, in which the layer is not linear."""
    return y.sin().flatten(1).sum(1)


def one_by_one(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    rows = [torch.autograd.grad(values(layer(row[None])).sum(), layer.weight)[0] for row in x]
    return torch.stack(rows)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_each_sample_has_its_own_gradient(layer, shape):
    layer, x = layer.double(), normals(*shape).requires_grad_()
    plain = layer(x)
    want, (back,) = one_by_one(layer, x), torch.autograd.grad(values(plain).sum(), x)
    apart = SampleGradients([layer])
    with apart.of(6):
        y = layer(x)
        values(y).sum().backward()
        (found,) = apart.taken()
    assert torch.equal(y, plain)  # the same to the bit
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(x.grad, back, atol=1e-12, rtol=1e-12)
    assert layer.weight.grad is None
    assert "forward" not in vars(layer)
    weights = normals(6, seed=1)
    torch.testing.assert_close(
        weighted_sum(weights, found), torch.einsum("n,n...->...", weights, want)
    )


def test_rows_of_both_branches_belong_to_one_sample():
    layer, x = nn.Linear(5, 3, bias=False).double(), normals(6, 2, 5)
    want, apart = one_by_one(layer, x), SampleGradients([layer])
    with apart.of(3):
        values(layer(x)).sum().backward()
        (found,) = apart.taken()
    torch.testing.assert_close(found, want[:3] + want[3:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "wide linear", "strided"])
def test_backward_passes_add_up_until_they_are_taken(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    x, apart = [normals(*shape, seed=s) for s in range(3)], SampleGradients([layer])
    want = [one_by_one(layer, rows) for rows in x]
    with apart.of(6):
        values(layer(x[0])).sum().backward()
        y = layer(x[1])
        values(y).sum().backward(retain_graph=True)
        with apart.added():  # the weight's own gradient, of the same graph
            (3 * values(y)).sum().backward()
        (first,) = apart.taken()
        values(layer(x[2])).sum().backward()
        (second,) = apart.taken()
        (third,) = apart.taken()
    torch.testing.assert_close(first, want[0] + want[1], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(second, want[2], atol=1e-11, rtol=1e-11)
    assert not third.any() and third.shape == second.shape
    torch.testing.assert_close(layer.weight.grad, 3 * want[1].sum(0), atol=1e-11, rtol=1e-11)
    layer.weight.grad = None


def test_through_checkpoints():
    layer, x = nn.Linear(5, 5, bias=False).double(), normals(4, 5)
    want, apart = one_by_one(layer, x), SampleGradients([layer])
    with apart.of(4):
        values(checkpoint(layer, x, use_reentrant=False)).sum().backward()
        (found,) = apart.taken()
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)


def test_half_precision_is_autocasts_and_sums_are_float32():
    layer, x = nn.Linear(32, 16, bias=False), normals(4, 8, 32).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
    want = one_by_one(layer.double(), x.detach().double())
    apart = SampleGradients([layer.float()])
    with apart.of(4), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        values(y.float()).sum().backward()
        (found,) = apart.taken()
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    assert found.dtype == x.grad.dtype == torch.float32
    assert (found - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 2),
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 3, groups=2, bias=False),
        nn.Conv2d(2, 2, 3, padding_mode="reflect", bias=False),
        nn.Conv2d(2, 2, 3, padding="same", bias=False),
        nn.Embedding(2, 2),
    ],
    ids=str,
)
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match="cannot be kept apart by sample"):
        SampleGradients([layer])


def test_rows_that_are_no_samples_are_refused():
    layer = nn.Linear(5, 3, bias=False)
    apart = SampleGradients([layer])
    with apart.of(4), pytest.raises(ValueError, match="6 rows for 4 samples"):
        layer(torch.randn(6, 5)).sum().backward()
    assert "forward" not in vars(layer)  # whatever happens


# --- the objective where nothing has moved yet ---------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_on_policy_every_objective_has_the_same_slope(objective):
    advantages = torch.tensor([1.5, -2.0, 0.0, 5.0], dtype=torch.float64)
    made = objective(ClipRange(low=1e-4, high=2e-4))
    slope, loss = slope_on_policy(made, advantages)
    torch.testing.assert_close(slope, -advantages)
    torch.testing.assert_close(loss, made(torch.zeros_like(advantages), advantages).loss)


# --- the rollout ---------------------------------------------------------------------------------


class Network(nn.Module):
    """A small denoiser in float64, with LoRA's two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(4, 4)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.base.requires_grad_(False)
        self.double()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)) + timestep / 1000)


PLANS = {
    "ddim": plan_diffusion(ddim_grid(5), Ddim(), Proportionate()),
    "flow": plan_flow(flow_grid(5), FlowSde(), Proportionate(), drop_last=1),
    "cps": plan_flow(flow_grid(5), Cps(), Native(), drop_last=1),
}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_one_pass_has_the_gradient_of_the_update(plan, ratio):
    """Against autograd on trajectories that a rollout has kept: METHOD M2 and M3, at rho = 1."""
    from comfyui_pcpo.pcpo.ratios import StepBatch

    network, noise = Network(), normals(3, len(plan) + 1, 2, 4)
    layers = [network.down, network.up]
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    kept = rollout(network, plan, noise, storage=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for k, i in enumerate(kept.step.tolist()):
        columns = (plan.mean_x, plan.mean_p, plan.std, plan.credit)
        rows = [column[i].expand(3) for column in columns]
        x, old, draw = kept.x[:, k], kept.prediction[:, k], kept.noise[:, k]
        prediction = network(x, plan.timesteps[i])
        log_ratio = RATIOS[ratio](prediction, StepBatch(x, old, draw, *rows))
        loss = loss + OBJECTIVES["log_hinge"]()(log_ratio, advantages).loss.sum()
    want = torch.autograd.grad(loss, [layer.weight for layer in layers])

    apart = SampleGradients(layers)
    seen = []

    def learn(i, prediction, step, frozen):
        seen.append((i, frozen))
        RATIOS[ratio](prediction, step).sum().backward()

    learned = plan.trained.nonzero().flatten().tolist()
    with apart.of(3):
        final, clean = rollout_with_gradient(
            network, plan, noise, learn, learned, storage=torch.float64
        )
        found = apart.taken()
    assert torch.equal(final, kept.final) and torch.equal(clean, kept.clean)
    assert seen == [(i, None) for i in learned]
    for gradient, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(
            weighted_sum(-advantages, gradient), wanted, atol=1e-12, rtol=1e-9
        )


def test_steps_that_are_not_learnt_run_without_gradient():
    plan, network, noise = PLANS["flow"], Network(), normals(2, 6, 2, 4)
    with_gradient, told = [], []

    def denoiser(x, timestep):
        with_gradient.append(torch.is_grad_enabled())
        return network(x, timestep)

    def base(x, timestep):
        assert not torch.is_grad_enabled()
        return torch.zeros_like(x)

    def learn(i, prediction, step, frozen):
        assert not frozen.any() and prediction.requires_grad and not step.old.requires_grad
        told.append(i)

    latents = []
    final, _ = rollout_with_gradient(
        denoiser, plan, noise, learn, [1, 3], reference=base, storage=torch.bfloat16,
        callback=lambda i, x, clean: latents.append(x),
    )  # fmt: skip
    assert with_gradient == [False, True, False, True, False] and told == [1, 3]
    kept = rollout(network, plan, noise, storage=torch.bfloat16)
    assert torch.equal(final, kept.final) and torch.equal(latents[-1], final)
    assert not final.requires_grad

"""The sampler's loop: noise, what is kept, precision, windows; and slicing of trajectories."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from itertools import combinations

import pytest
import torch
from comfyui_pcpo.pcpo import KLS, RATIOS
from comfyui_pcpo.pcpo.credit import Native, Proportionate
from comfyui_pcpo.pcpo.plan import deterministic, plan_diffusion, plan_flow
from comfyui_pcpo.pcpo.ratios import StepBatch, gaussian_log_prob, weighted_log_ratio
from comfyui_pcpo.pcpo.rollout import generator_for, noise_streams, rollout
from comfyui_pcpo.pcpo.schedules import ddim_grid, flow_grid, scaled_linear_alpha_bars
from comfyui_pcpo.pcpo.trajectory import concatenate
from comfyui_pcpo.pcpo.transitions import Cps, DanceSde, Ddim, FlowSde
from diffusers import DDIMScheduler
from torch.testing import assert_close

torch.set_num_threads(1)

SHAPE = (4, 3, 5)


def linear_denoiser(x, t):
    return 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, -3) + t / 1000


def bent_denoiser(x, t):
    """Bitwise the same for the same input, whatever the batch; about as steep as a network."""
    return torch.sin(3 * x) + 0.5 * x.roll(1, -1) + t / 1000


def sd_plan(num_steps=50, credit=None, **options):
    return plan_diffusion(ddim_grid(num_steps), Ddim(1.0), credit or Native(), **options)


def noise_for(num_steps, images=3, seed=0):
    return noise_streams([(seed, image) for image in range(images)], num_steps, SHAPE)


# --- noise ---------------------------------------------------------------------------------------


def test_an_image_has_its_noise_in_any_batch():
    keys = [(7, 0, prompt, image) for prompt in range(3) for image in range(2)]
    together = noise_streams(keys, 5, SHAPE)
    assert together.shape == (6, 6, *SHAPE)
    assert together.dtype == torch.float32
    torch.manual_seed(99)  # the global generator has no part in it
    alone = torch.cat([noise_streams([key], 5, SHAPE) for key in reversed(keys)])
    assert torch.equal(alone.flip(0), together)


def test_noise_is_standard_normal_and_differs_between_images_and_steps():
    noise = noise_streams([(0, 1), (0, 2), (1, 0)], 3, (4, 32, 32))
    rows = noise.reshape(12, -1)
    # 4096 numbers a row: standard errors 0.016 of the mean and 0.011 of the deviation; 5 of them
    assert rows.mean(1).abs().max() < 0.08
    assert (rows.std(1) - 1).abs().max() < 0.056
    correlation = rows @ rows.T / 4096 - torch.eye(12)
    assert correlation.abs().max() < 0.11  # standard error 0.016, 0.022 on the diagonal


@pytest.mark.parametrize(("one", "other"), [((1, 23), (12, 3)), ((1, 2), (2, 1)), ((0,), (0, 0))])
def test_distinct_keys_are_distinct_streams(one, other):
    first, second = (torch.randn(4, generator=generator_for(*key)) for key in (one, other))
    assert not torch.equal(first, second)


def test_a_stream_is_the_same_on_every_machine():
    # the seed by hand: the first 8 bytes of SHA-256 of "0/1", little-endian, halved
    first = hashlib.sha256(b"0/1").digest()[:8]
    assert generator_for(0, 1).initial_seed() == int.from_bytes(first, "little") // 2


# --- the loop ------------------------------------------------------------------------------------


def diffusers_loop(noise, eta):
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scaled_linear_alpha_bars()  # float64, see test_transitions
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    x = noise[:, 0]
    for i, t in enumerate(scheduler.timesteps):
        prediction = linear_denoiser(x, t.double())
        step = scheduler.step(prediction, int(t), x, eta=eta, variance_noise=noise[:, i + 1])
        x = step.prev_sample
    return x, step.pred_original_sample


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_rollout_is_diffusers_loop(eta):
    noise = noise_for(20).double()
    plan = sd_plan(20)
    if eta == 0:
        plan = deterministic(plan, ddim_grid(20), Ddim(1.0), "epsilon")
    trajectory = rollout(linear_denoiser, plan, noise, storage=torch.float64)
    final, clean = diffusers_loop(noise, eta)
    assert_close(trajectory.final, final, rtol=1e-10, atol=1e-10)
    assert_close(trajectory.clean, clean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make_plan",
    [
        lambda: sd_plan(8),
        lambda: sd_plan(8, Proportionate()),
        lambda: plan_flow(flow_grid(8), DanceSde(), Native()),
        lambda: plan_flow(flow_grid(8), FlowSde(), Proportionate()),
    ],
    ids=["ddim", "solved ddim", "dance_sde", "flow_sde"],
)
def test_what_is_kept_reproduces_every_next_latent(make_plan):
    plan, noise = make_plan().to("cpu"), noise_for(8)
    trajectory = rollout(bent_denoiser, plan, noise)
    assert trajectory.step.tolist() == list(range(8))
    assert torch.equal(trajectory.x[:, 0], noise[:, 0])
    assert torch.equal(trajectory.noise, noise[:, 1:])
    for i in range(8):
        x, prediction = trajectory.x[:, i], trajectory.prediction[:, i]
        assert torch.equal(prediction, bent_denoiser(x, plan.timesteps[i]))
        x_next = plan.mean_x[i] * x + plan.mean_p[i] * prediction
        x_next = x_next + plan.std[i] * trajectory.noise[:, i]
        assert torch.equal(x_next, trajectory.x[:, i + 1] if i < 7 else trajectory.final)
    clean = plan.x0_x[7] * trajectory.x[:, 7] + plan.x0_p[7] * trajectory.prediction[:, 7]
    assert torch.equal(trajectory.clean, clean)


def test_only_trained_steps_are_kept():
    plan, noise = sd_plan(6, drop_last=2).to("cpu"), noise_for(6)
    trajectory = rollout(bent_denoiser, plan, noise, reference=linear_denoiser)
    assert trajectory.step.tolist() == [0, 1, 2, 3]
    assert trajectory.x.shape == trajectory.reference.shape == (3, 4, *SHAPE)
    for i in range(4):
        expected = linear_denoiser(trajectory.x[:, i], plan.timesteps[i])
        assert torch.equal(trajectory.reference[:, i], expected)
    everything = rollout(bent_denoiser, sd_plan(6).to("cpu"), noise)
    assert torch.equal(trajectory.final, everything.final)
    assert everything.reference is None


def test_a_deterministic_plan_keeps_nothing():
    plan = deterministic(sd_plan(4), ddim_grid(4), Ddim(1.0), "epsilon").to("cpu")
    trajectory = rollout(linear_denoiser, plan, noise_for(4))
    assert trajectory.x.shape == trajectory.noise.shape == (3, 0, *SHAPE)
    assert len(trajectory) == 3
    assert len(trajectory.step) == 0


def test_the_callback_sees_every_step():
    seen = []
    plan = sd_plan(5, drop_last=1).to("cpu")
    trajectory = rollout(linear_denoiser, plan, noise_for(5), callback=lambda *a: seen.append(a))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[0][1], trajectory.x[:, 1])
    assert torch.equal(seen[-1][1], trajectory.final)
    assert torch.equal(seen[-1][2], trajectory.clean)


def test_a_rollout_builds_no_graph():
    weight = torch.ones((), requires_grad=True)
    trajectory = rollout(lambda x, t: weight * x, sd_plan(3).to("cpu"), noise_for(3))
    assert not trajectory.prediction.requires_grad
    assert not trajectory.final.requires_grad


# --- precision of what is stored (BASELINES B8) --------------------------------------------------


def on_policy_log_ratio(trajectory, plan):
    """Per image and step, with the network's prediction made again from what was stored."""
    rows = []
    for j, i in enumerate(trajectory.step.tolist()):
        again = bent_denoiser(trajectory.x[:, j].float(), plan.timesteps[i])
        old, noise = trajectory.prediction[:, j], trajectory.noise[:, j]
        rows.append(weighted_log_ratio(again, old, noise, plan.credit[i].expand(len(old))))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("credit", [Native(), Proportionate()])
def test_on_policy_the_log_ratio_is_exactly_zero(storage, credit):
    plan = sd_plan(50, credit).to("cpu")
    trajectory = rollout(bent_denoiser, plan, noise_for(50), storage=storage)
    assert trajectory.x.dtype == trajectory.noise.dtype == storage
    assert trajectory.prediction.dtype == torch.float32
    assert (on_policy_log_ratio(trajectory, plan) == 0).all()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_what_is_kept_rounded_is_what_was_used(storage):
    plan = sd_plan(10).to("cpu")
    trajectory = rollout(bent_denoiser, plan, noise_for(10), storage=storage)
    for i in range(9):
        x, noise = trajectory.x[:, i].float(), trajectory.noise[:, i].float()
        x_next = plan.mean_x[i] * x + plan.mean_p[i] * trajectory.prediction[:, i]
        x_next = x_next + plan.std[i] * noise
        assert torch.equal(x_next.to(storage), trajectory.x[:, i + 1])


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_on_policy_the_density_is_exactly_zero_too(storage):
    plan = sd_plan(50).to("cpu")
    trajectory = rollout(bent_denoiser, plan, noise_for(50), storage=storage)
    names = ("mean_x", "mean_p", "std", "credit")
    for j in (0, 25, 48, 49):
        x, noise = trajectory.x[:, j].float(), trajectory.noise[:, j].float()
        old = trajectory.prediction[:, j]
        rows = {name: getattr(plan, name)[j].expand(3) for name in names}
        step = StepBatch(x=x, old=old, noise=noise, **rows)
        assert (RATIOS["density"](bent_denoiser(x, plan.timesteps[j]), step) == 0).all()


def test_rounding_after_use_moves_the_ratio_beyond_the_clip_range():
    # the baselines' fault: the network of the rollout saw a latent that was not the stored one
    plan = sd_plan(50).to("cpu")
    options = {"storage": torch.bfloat16, "round_before_use": False}
    off = on_policy_log_ratio(rollout(bent_denoiser, plan, noise_for(50), **options), plan).abs()
    heavy = plan.weight > 2  # the steps of small sigma
    assert heavy.any()
    assert (off[:, heavy] > 2e-4).all()
    assert off.max() > 5e-4


@pytest.mark.parametrize(
    ("storage", "step", "printed"),
    [
        (torch.bfloat16, 49, 0.9967),
        (torch.float16, 49, 0.99994),
        (torch.bfloat16, 48, 0.9991),
        (torch.float16, 48, 0.99999),
    ],
)
def test_the_density_of_a_rounded_latent_has_the_printed_error(storage, step, printed):
    # B8: unit-variance latents; ddpo-pytorch stores x_next rounded and keeps the old density
    plan = sd_plan(50).to("cpu")
    x_next = noise_streams([(0, i) for i in range(8)], 0, (4, 64, 64))[:, 0]
    z = noise_streams([(1, i) for i in range(8)], 0, (4, 64, 64))[:, 0]
    std = plan.std[step].expand(8)
    mean = x_next - plan.std[step] * z
    before = gaussian_log_prob(x_next, mean, std)
    after = gaussian_log_prob(x_next.to(storage).float(), mean, std)
    ratio = (after - before).mean().exp().item()
    # the printed digits are a simulation's: a tenth of the distance from 1 is allowed
    assert 1 - ratio == pytest.approx(1 - printed, rel=0.1, abs=1e-5)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", [FlowSde(), DanceSde(), Cps()])
def test_outside_a_window_nothing_is_random(transition):
    grid = flow_grid(8)
    full = plan_flow(grid, transition, Proportionate(), drop_last=1)
    ode = deterministic(full, grid, transition)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[2:4] = True
    plan = full.window(inside, ode).to("cpu")
    assert (plan.std > 0).tolist() == inside.tolist()
    assert torch.equal(plan.trained, inside)
    assert_close(plan.credit, full.credit.float(), rtol=0, atol=0)
    assert_close(plan.weight, full.weight.float(), rtol=0, atol=0)
    for name in ("mean_x", "mean_p"):
        expected = torch.where(inside, getattr(full, name), getattr(ode, name))
        assert_close(getattr(plan, name), expected.float(), rtol=0, atol=0)

    noise, outside, within = noise_for(8), noise_for(8), noise_for(8)
    other = noise_for(8, seed=1)
    outside[:, [1, 2, 5, 6, 7, 8]] = other[:, [1, 2, 5, 6, 7, 8]]  # draws of steps 0-1 and 4-7
    within[:, 3] = other[:, 3]
    trajectory = rollout(bent_denoiser, plan, noise)
    assert trajectory.step.tolist() == [2, 3]
    assert torch.equal(rollout(bent_denoiser, plan, outside).final, trajectory.final)
    assert not torch.equal(rollout(bent_denoiser, plan, within).final, trajectory.final)


def test_a_window_trains_no_step_that_the_plan_drops():
    grid = flow_grid(4)
    full = plan_flow(grid, FlowSde(), Native(), drop_last=1)
    plan = full.window(
        torch.tensor([False, False, True, True]), deterministic(full, grid, FlowSde())
    )
    assert plan.trained.tolist() == [False, False, True, False]


def test_a_plan_in_float32():
    plan = sd_plan(4)
    small = plan.to("cpu")
    for field in fields(plan):
        column = getattr(small, field.name)
        if field.name == "branches":
            continue
        if field.name in ("scale", "loss", "kl", "compared"):  # of what has one
            assert column is None
            continue
        assert column.dtype == (torch.bool if field.name == "trained" else torch.float32)
        assert_close(column, getattr(plan, field.name).to(column.dtype), rtol=0, atol=0)
    assert len(small) == 4


# --- trajectories --------------------------------------------------------------------------------


def same(one, other):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name


@pytest.mark.parametrize("reference", [None, linear_denoiser])
def test_trajectories_are_cut_and_joined(reference):
    plan, noise = sd_plan(4).to("cpu"), noise_for(4, images=5)
    whole = rollout(bent_denoiser, plan, noise, reference=reference)
    parts = [
        rollout(bent_denoiser, plan, noise[rows], reference=reference)
        for rows in ([0, 1], [2, 3, 4])
    ]
    same(concatenate(parts), whole)
    same(concatenate([whole[:2], whole[2:]]), whole)
    same(whole[:2], parts[0])
    assert [len(part) for part in parts] == [2, 3]
    same(whole.to("cpu"), whole)
    assert whole.to("meta").x.device.type == "meta"
    assert whole.to("meta").step.device.type == "cpu"


# --- the KL of some steps ------------------------------------------------------------------------


def kl_gradient(plan, noise, theta, asked=None):
    """The gradient of the KL of a network with one number, and its rollout."""

    def base(x, timestep):
        if asked is not None:
            asked.append(plan.timesteps.tolist().index(timestep.item()))
        return bent_denoiser(x, timestep)

    kept = rollout(
        lambda x, t: bent_denoiser(x, t) + 0.1 * x, plan, noise, reference=base, storage=noise.dtype
    )
    total = torch.zeros((), dtype=torch.float64)
    for column, step in enumerate(kept.step):
        prediction = (
            bent_denoiser(kept.x[:, column], plan.timesteps[step]) + theta * kept.x[:, column]
        )
        weight, interval = (c[step].expand(len(noise)) for c in (plan.weight, plan.interval))
        kl = KLS["exact"](prediction, kept.reference[:, column], weight, interval).sum()
        total = total + (kl if plan.kl is None else plan.kl[step] * kl)
    return torch.autograd.grad(total, theta)[0], kept


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_kl_of_some_steps_is_the_kl_of_all_on_average(count):
    """Over all choices of steps the mean of the gradients is the whole gradient."""
    plan = plan_flow(flow_grid(6), FlowSde(0.7), Native(), drop_last=1)
    noise, theta = noise_for(6).double(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    want, whole = kl_gradient(plan, noise, theta)
    found = []
    for chosen in combinations(range(5), count):
        asked = []
        some = plan.comparing(torch.tensor(chosen))
        gradient, kept = kl_gradient(some, noise, theta, asked)
        assert asked == list(chosen)  # no other step costs a pass of the base
        assert torch.equal(kept.final, whole.final)
        assert torch.equal(some.to("cpu").compared, some.compared)
        found.append(gradient)
    assert_close(torch.stack(found).mean(), want, rtol=1e-12, atol=0)
    assert torch.stack(found).std() > 1e-3 * want.abs()

"""Native and proportionate credit: the method's printed figures and its identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo import CREDITS
from comfyui_pcpo.pcpo.credit import (
    Exact,
    Native,
    ObjectiveOnly,
    Proportionate,
    Published,
    Relative,
    WeightedLoss,
    native_weights,
    solve_weight,
    solved_std,
)
from comfyui_pcpo.pcpo.plan import deterministic, plan_diffusion, plan_flow, step_set
from comfyui_pcpo.pcpo.schedules import (
    ddim_grid,
    flow_grid,
    scaled_linear_alpha_bars,
    zero_terminal_snr,
)
from comfyui_pcpo.pcpo.transitions import Cps, DanceSde, Ddim, FlowSde, ddim_steps
from torch.testing import assert_close

torch.set_num_threads(1)

FLOWS = (DanceSde(0.3), FlowSde(0.7), Cps(0.8))
SHARED = [Exact, Published, ObjectiveOnly, Proportionate]
"""Rules whose credit is proportionate; `Relative` has its shares in the policy."""
OF_FLOW = [Native, Proportionate, ObjectiveOnly, Relative, WeightedLoss]


def zero_snr_grid(num_steps=50):
    return ddim_grid(num_steps, zero_terminal_snr(scaled_linear_alpha_bars()), spacing="trailing")


def native(grid, transition=None, drop_last=0):
    return Native()(grid, transition or Ddim(1.0), step_set(len(grid.timesteps), drop_last))


def solve(grid, drop_last=0, target=None, eta=1.0):
    return Exact(target)(grid, Ddim(eta), step_set(len(grid.timesteps), drop_last))


def where(mask) -> list[int]:
    return mask.nonzero().flatten().tolist()


def share(plan):
    """What each step of a plan counts for, in the network's prediction."""
    return (
        plan.credit
        * (1 if plan.scale is None else plan.scale)
        * (1 if plan.loss is None else plan.loss)
    )


def a_and_b(grid):
    """A_t and B_t of METHOD M3, as numpy."""
    now, after = grid.alpha_bar.numpy(), grid.alpha_bar_next.numpy()
    return np.sqrt(after * (1 - now) / now), np.sqrt(1 - after)


# --- native weights ------------------------------------------------------------------------------


def test_native_weights_of_sd_at_50_steps():
    grid, weight = ddim_grid(50), native(ddim_grid(50)).weight
    assert weight.min().item() == pytest.approx(0.374150, abs=5e-7)
    assert weight.max().item() == pytest.approx(3.274788, abs=5e-7)
    assert weight.mean().item() == pytest.approx(0.5169002, abs=5e-8)
    assert grid.timesteps[weight.argmin()] == 441
    assert grid.timesteps[weight.argmax()] == 21


@pytest.mark.parametrize(
    ("spacing", "num_steps", "mean"),
    [
        ("leading", 30, 0.7203175),
        ("leading", 25, 0.8267541),
        ("leading", 20, 0.9802297),
        ("trailing", 50, 0.5333540),
        ("trailing", 20, 1.0833035),
    ],
)
def test_mean_native_weight(spacing, num_steps, mean):
    weight = native(ddim_grid(num_steps, spacing=spacing)).weight
    assert weight.mean().item() == pytest.approx(mean, abs=5e-8)


def test_w_star_where_the_last_step_is_dropped():
    credit = solve(ddim_grid(50), drop_last=1)
    assert credit.credit[0].item() == pytest.approx(0.5070, abs=5e-5)
    assert where(credit.trained) == list(range(49))


@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
def test_native_weight_of_ddim_is_c_over_sigma(eta):
    # METHOD M3: C = A - sqrt(1 - abar_p - sigma^2), w = C / sigma
    grid = ddim_grid(50)
    a, b = a_and_b(grid)
    now, after = grid.alpha_bar.numpy(), grid.alpha_bar_next.numpy()
    std = eta * b * np.sqrt((1 - now / after) / (1 - now))
    expected = (a - np.sqrt(b**2 - std**2)) / std
    assert_close(native(grid, Ddim(eta)).weight, torch.from_numpy(expected), rtol=1e-11, atol=0)


def test_native_weight_of_ddpm_is_a_ratio_of_signal_to_noise_ratios():
    grid = ddim_grid(50)
    snr = grid.alpha_bar / (1 - grid.alpha_bar)
    snr_next = grid.alpha_bar_next / (1 - grid.alpha_bar_next)
    assert_close(native(grid).weight, (snr_next / snr - 1).sqrt(), rtol=1e-11, atol=0)


def test_ddpm_has_the_smallest_weight_that_any_noise_can_give():
    grid, best = ddim_grid(50), native(ddim_grid(50)).weight
    a, b = a_and_b(grid)
    share = np.linspace(1e-3, 1, 20_000)[:, None]
    std = share * b
    weight = (a - np.sqrt(b**2 - std**2)) / std
    assert (weight.min(axis=0) >= best.numpy() * (1 - 1e-12)).all()
    np.testing.assert_allclose(weight.min(axis=0), best, rtol=1e-5)  # the grid search's own step


def test_native_weights_of_flow_grpo():
    printed = [0.0570, 0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867, 1.7706]
    weight = native(flow_grid(10), FlowSde(0.7)).weight
    assert [round(w, 4) for w in weight.tolist()] == printed


def test_native_weights_of_dance_grpo():
    weight = native(flow_grid(16, kind="uniform"), DanceSde(0.3)).weight
    assert weight.min().item() == pytest.approx(0.4915, abs=5e-5)
    assert weight.max().item() == pytest.approx(1.6670, abs=5e-5)


@pytest.mark.parametrize("eta", [0.3, 0.9])
def test_native_weight_of_a_flow_sde_is_the_papers(eta):
    # METHOD M4: w = sqrt(Delta) / s (1 + (1 - t) s^2 / (2 t))
    grid = flow_grid(16, kind="uniform")
    t, delta = grid.timesteps, grid.intervals
    expected = delta.sqrt() / eta * (1 + (1 - t) * eta**2 / (2 * t))
    assert_close(native(grid, DanceSde(eta)).weight, expected, rtol=1e-13, atol=0)


# --- Proposition 1 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "projected"),
    [
        (ddim_grid(50), [*range(43, 50)]),
        (ddim_grid(20), [*range(17, 20)]),
        (ddim_grid(30), [*range(26, 30)]),
        (ddim_grid(50, spacing="trailing"), [*range(45, 50)]),
        (zero_snr_grid(), [*range(8), *range(46, 50)]),
    ],
)
def test_which_steps_are_projected(grid, projected):
    credit = solve(grid)
    assert where(credit.projected) == projected
    assert where(credit.solved) == [i for i in range(len(grid.timesteps)) if i not in projected]
    posterior = Ddim(1.0)(grid).std
    assert_close(credit.steps.std[projected], posterior[projected], rtol=0, atol=0)


@pytest.mark.parametrize("num_steps", [20, 30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_solved_noise_gives_the_credit(spacing, num_steps):
    grid = ddim_grid(num_steps, spacing=spacing)
    credit = solve(grid)
    # constant on an even grid; trailing 30 has steps of 33 and 34
    w = native(grid).weight.mean() * grid.intervals / grid.intervals.mean()
    assert_close(credit.credit, w, rtol=1e-12, atol=0)
    solved = credit.solved
    assert_close(credit.weight[solved], credit.credit[solved], rtol=1e-10, atol=0)
    assert (credit.weight[credit.projected] > credit.credit[credit.projected]).all()


def test_the_solved_noise_is_the_smaller_root():
    grid = ddim_grid(50)
    credit = solve(grid)
    w = native(grid).weight.mean().item()
    a, b = a_and_b(grid)
    for i in where(credit.solved):
        roots = np.roots([1 + w**2, -2 * a[i] * w, a[i] ** 2 - b[i] ** 2])
        assert credit.steps.std[i].item() == pytest.approx(roots.min(), rel=1e-9)
        assert credit.steps.std[i].item() < b[i]


def test_a_large_target_makes_every_step_solvable():
    grid = ddim_grid(50)
    assert solve(grid, target=3.275).solved.all()
    assert where(solve(grid, target=3.274).projected) == [48]  # t = 21, whose weight is 3.274788
    assert_close(
        solve(grid, target=3.5).weight, torch.full((50,), 3.5).double(), rtol=1e-10, atol=0
    )


def test_no_solution_where_there_is_nothing_to_solve():
    grid = ddim_grid(50, final_alpha_bar=1.0)
    std, solvable = solved_std(grid, torch.full((50,), 4.0).double())
    assert solvable[:-1].all()
    assert not solvable[-1]
    assert std[-1] == 0


@pytest.mark.parametrize("drop_last", [0, 1, 7])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("kind", SHARED)
def test_the_sum_of_the_credit_is_the_native_sum_for_diffusion(kind, eta, drop_last):
    grid, over = ddim_grid(50, spacing="linspace"), step_set(50, drop_last)
    before, after = Native()(grid, Ddim(eta), over), kind()(grid, Ddim(eta), over)
    assert_close(after.trained, before.trained)
    native_sum = before.weight[before.trained].sum()
    assert_close(after.credit[after.trained].sum(), native_sum, rtol=1e-12, atol=0)


def test_final_variance_of_gaussian_data():
    # unit-variance data: eps-hat = sqrt(1 - abar) x exactly, every step is linear and Gaussian
    grid = ddim_grid(50)
    ddpm = plan_diffusion(grid, Ddim(1.0), Native())
    plans = {
        "ddpm": ddpm,
        "solved": plan_diffusion(grid, Ddim(1.0), Exact()),
        "ode": deterministic(ddpm, grid, Ddim(1.0), "epsilon"),
    }
    found = {}
    for name, plan in plans.items():
        variance = 1.0
        for i, a in enumerate(grid.alpha_bar.tolist()):
            gain = float(plan.mean_x[i] + plan.mean_p[i] * (1 - a) ** 0.5)
            variance = gain**2 * variance + float(plan.std[i]) ** 2
        found[name] = round(variance, 3)
    assert found == {"ddpm": 0.894, "solved": 0.914, "ode": 0.948}


@pytest.mark.parametrize("kind", SHARED)
def test_credit_is_in_proportion_to_the_interval(kind):
    grid = ddim_grid(50, spacing="linspace")
    credit = kind()(grid, Ddim(1.0), step_set(50, 1))
    delta = -np.diff(grid.timesteps.numpy(), append=grid.timesteps[-1] - 20)
    w_star = native(grid).weight[:49].mean().item()
    expected = w_star * delta / delta[:49].mean()
    np.testing.assert_allclose(credit.credit[:49], expected[:49], rtol=1e-12)
    assert len(set(credit.credit[:49].tolist())) > 1


# --- Proposition 2 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "transition", "over_all", "without_last"),
    [
        (flow_grid(10), FlowSde(0.7), 5.7054, 3.9702),
        (flow_grid(16, kind="uniform"), DanceSde(0.3), 13.3432, 14.0114),
        (flow_grid(12, kind="uniform"), DanceSde(0.3), 11.4842, 12.3283),
    ],
)
def test_zeta(grid, transition, over_all, without_last):
    for drop_last, zeta in ((0, over_all), (1, without_last)):
        credit = Proportionate()(grid, transition, step_set(len(grid.timesteps), drop_last))
        ratio = (credit.credit / grid.intervals)[credit.trained]
        assert_close(ratio, torch.full_like(ratio, zeta), rtol=0, atol=5e-5)


@pytest.mark.parametrize("drop_last", [0, 1, 3])
@pytest.mark.parametrize("transition", FLOWS)
def test_the_sum_of_the_credit_is_the_native_sum_for_flow(transition, drop_last):
    grid, over = flow_grid(10), step_set(10, drop_last)
    before, after = Native()(grid, transition, over), Proportionate()(grid, transition, over)
    native_sum = before.weight[before.trained].sum()
    assert_close(after.credit[after.trained].sum(), native_sum, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transition", FLOWS)
def test_the_sampler_of_a_flow_is_not_changed(transition):
    grid = flow_grid(10)
    before, after = (plan_flow(grid, transition, c()) for c in (Native, Proportionate))
    for name in ("mean_x", "mean_p", "std", "weight"):
        assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=0)
    assert not torch.equal(before.credit, after.credit)
    assert_close(before.credit, before.weight, rtol=1e-13, atol=0)


def test_cps_has_no_noise_at_its_last_step():
    credit = Proportionate()(flow_grid(10), Cps(0.8), step_set(10))
    assert where(credit.trained) == list(range(9))


# --- step sets and edges -------------------------------------------------------------------------


def test_step_set():
    assert where(step_set(4)) == [0, 1, 2, 3]
    assert where(step_set(4, 1)) == [0, 1, 2]


@pytest.mark.parametrize("drop_last", [-1, 2, 3])
def test_a_step_set_without_steps_is_refused(drop_last):
    with pytest.raises(ValueError, match=f"drop_last is {drop_last} of 2 steps; it is from 0 to 1"):
        step_set(2, drop_last)


@pytest.mark.parametrize("kind", CREDITS.values())
@pytest.mark.parametrize(
    "grid", [ddim_grid(50, final_alpha_bar=1.0), ddim_grid(50, spacing="linspace")]
)
def test_a_step_without_a_policy_is_left_out(kind, grid):
    # final_alpha_bar 1: no noise at the last step; linspace: its last step goes from 0 to 0
    credit = kind()(grid, Ddim(1.0), step_set(50))
    assert where(~credit.policy) == [49]
    assert where(credit.trained) == list(range(49))
    assert not (credit.solved | credit.projected)[49]
    plan = plan_diffusion(grid, Ddim(1.0), kind())
    assert where(plan.trained) == list(range(49))
    assert plan.std[49] == 0
    assert plan.weight[49] == plan.credit[49] == 0
    if kind is not Native:
        mean = native(grid).weight[:49].mean()
        scale = 1 if plan.scale is None else plan.scale[:49]
        assert_close((plan.credit[:49] * scale).mean(), mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", CREDITS.values())
def test_pure_noise_takes_the_v_form(kind):
    # METHOD M3: w_v = (sqrt(abar_p (1 - abar)) - sqrt(abar) sqrt(1 - abar_p - std^2)) / std
    grid = zero_snr_grid()
    plan = plan_diffusion(grid, Ddim(1.0), kind(), prediction_type="v_prediction")
    now, after = grid.alpha_bar, grid.alpha_bar_next
    direction = (1 - after - plan.std**2).clamp(min=0).sqrt()
    expected = ((after * (1 - now)).sqrt() - now.sqrt() * direction) / plan.std
    assert plan.trained.all()
    assert_close(plan.weight, expected, rtol=1e-10, atol=0)
    assert_close(plan.weight[0], after[0].sqrt() / plan.std[0], rtol=1e-12, atol=0)
    assert_close(plan.credit[0], plan.weight[0], rtol=0, atol=0)
    if kind is not Native:  # w* is a mean over the other 49
        w_star = native(grid).weight[1:].mean()
        assert_close(share(plan)[1:] / now[1:].sqrt(), w_star.expand(49), rtol=1e-11, atol=0)


def test_an_epsilon_network_cannot_start_from_pure_noise():
    with pytest.raises(ValueError, match=r"steps \[0\] start from pure noise.*v_prediction"):
        plan_diffusion(zero_snr_grid(), Ddim(1.0), Native())


def test_a_network_of_the_clean_sample_can_start_from_pure_noise():
    # mean_p = sqrt(abar_p) there, and w in its units is -sqrt(abar_p) / std
    grid = zero_snr_grid()
    plan = plan_diffusion(grid, Ddim(1.0), Proportionate(), prediction_type="sample")
    expected = -grid.alpha_bar_next[0].sqrt() / plan.std[0]
    assert_close(plan.weight[0], expected, rtol=1e-12, atol=0)
    assert plan.credit[0] == plan.weight[0]


@pytest.mark.parametrize(
    ("kind", "grid", "transition"),
    [
        *((kind, ddim_grid(10), Ddim(0.0)) for kind in CREDITS.values()),
        *((kind, flow_grid(10), sde) for kind in OF_FLOW for sde in (DanceSde(0.0), Cps(0.0))),
    ],
)
def test_a_sampler_without_noise_is_refused(kind, grid, transition):
    with pytest.raises(ValueError, match=r"no step carries a policy.*raise the noise level"):
        kind()(grid, transition, step_set(10))


def test_an_empty_step_set_is_refused():
    with pytest.raises(ValueError, match="widen the step set"):
        Native()(flow_grid(10), FlowSde(), torch.zeros(10, dtype=torch.bool))


@pytest.mark.parametrize("kind", [*SHARED, Relative, WeightedLoss])
@pytest.mark.parametrize(
    ("grid", "transition"), [(ddim_grid(50), Ddim(1.0)), (flow_grid(10), FlowSde(0.7))]
)
def test_a_target_is_the_mean_credit(kind, grid, transition):
    if kind in (Exact, Published) and transition.name != "ddim":
        return
    over = step_set(len(grid.timesteps), 1)
    credit = kind(target=1.25)(grid, transition, over)
    mean = credit.share[over].mean().item()
    assert mean == pytest.approx(1.25, rel=1e-13)


@pytest.mark.parametrize("kind", [Exact, Published])
def test_noise_that_is_solved_for_is_ddims(kind):
    with pytest.raises(ValueError, match="changes DDIM's noise; on flow take 'proportionate'"):
        kind()(flow_grid(10), FlowSde(), step_set(10))


def test_a_weight_at_which_nothing_can_be_solved_is_refused():
    grid, over = ddim_grid(50), step_set(50)
    with pytest.raises(ValueError, match=r"target weight is 0.3.*begin at 0.3741; take more"):
        Exact(target=0.3)(grid, Ddim(), over)
    with pytest.raises(ValueError, match=r"solve weight is 0.37.*begin at 0.3741; take more"):
        Published(solve_weight=0.37)(grid, Ddim(), over)
    assert where(Exact(target=0.3742)(grid, Ddim(), over).solved)


def test_which_rules_change_the_noise():
    grid, over = ddim_grid(50), step_set(50)
    steps = Ddim(1.0)(grid)
    for kind in (ObjectiveOnly, Relative, WeightedLoss):
        credit = kind()(grid, Ddim(1.0), over)
        assert_close(credit.steps.std, steps.std, rtol=0, atol=0)
        assert_close(credit.weight, native_weights(grid, steps), rtol=0, atol=0)
    changed = Exact()(grid, Ddim(1.0), over)
    assert (changed.steps.std[changed.solved] < steps.std[changed.solved]).all()
    again = ddim_steps(grid, changed.steps.std)
    assert_close(changed.steps.m_eps, again.m_eps, rtol=0, atol=0)


# --- as the authors run it -----------------------------------------------------------------------


def authors_std(a, b, w):
    """METHOD M3's larger root, by numpy's own solver; NaN where there is none."""
    std = np.full_like(a, np.nan)
    for i in range(len(a)):
        roots = np.roots([1 + w**2, -2 * a[i] * w, a[i] ** 2 - b[i] ** 2])
        if np.isreal(roots).all() and a[i] > b[i]:  # linspace's last step goes nowhere
            std[i] = roots.real.max()
    return std


def test_the_published_sampler_at_50_steps():
    grid, over = ddim_grid(50), step_set(50)
    credit, posterior = Published(solve_weight=4.5)(grid, Ddim(), over), Ddim()(grid).std
    assert credit.solved.all()
    assert_close(
        credit.steps.std, torch.from_numpy(authors_std(*a_and_b(grid), 4.5)), rtol=1e-9, atol=0
    )
    assert credit.steps.std[0].item() == pytest.approx(0.4467, abs=5e-5)
    assert credit.steps.std[20].item() == pytest.approx(0.3915, abs=5e-5)
    assert posterior[20].item() == pytest.approx(0.3229, abs=5e-5)
    energy = credit.steps.std.square().sum() / posterior.square().sum()
    assert energy.item() == pytest.approx(1.258, abs=5e-4)
    ratio = credit.steps.std / posterior
    assert (round(ratio.min().item(), 2), round(ratio.max().item(), 2)) == (0.71, 1.25)


def test_the_published_credit_is_uniform_and_the_true_weight_is_not():
    grid = ddim_grid(50)
    credit = Published(solve_weight=4.5)(grid, Ddim(), step_set(50))
    # the authors' constant: w divided by 8.70575076181, the mean native weight
    assert_close(credit.credit, torch.full((50,), 4.5 / 8.70575076181).double(), rtol=0, atol=1e-6)
    a, b = a_and_b(grid)
    std = credit.steps.std.numpy()
    true = (a - np.sqrt(b**2 - std**2)) / std
    np.testing.assert_allclose(credit.weight, true, rtol=1e-10)
    assert (round(true.min(), 3), round(true.max(), 3)) == (0.385, 3.368)
    other = (a + np.sqrt(b**2 - std**2)) / std  # what the larger root makes constant
    np.testing.assert_allclose(other, 4.5, rtol=1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [8, 20, 50])
def test_the_solve_weight_is_the_largest_with_the_authors_energy(num_steps, spacing):
    grid = ddim_grid(num_steps, spacing=spacing)
    (a, b), posterior = a_and_b(grid), Ddim()(grid).std.numpy()

    def energy(w):
        std = authors_std(a, b, w)
        return np.where(np.isnan(std), posterior, std)

    published = authors_std(*a_and_b(ddim_grid(50)), 4.5)
    wanted = (published**2).sum() / Ddim()(ddim_grid(50)).std.square().sum().item()
    w = solve_weight(grid)
    assert (energy(w) ** 2).sum() / (posterior**2).sum() == pytest.approx(wanted, rel=1e-7)
    larger = [
        (energy(w * more) ** 2).sum() / (posterior**2).sum() for more in (1.001, 1.01, 1.1, 2, 9)
    ]
    assert all(more < wanted for more in larger)


@pytest.mark.parametrize(("num_steps", "w"), [(8, 2.376), (20, 3.060), (50, 4.5), (100, 6.222)])
def test_solve_weights(num_steps, w):
    assert solve_weight(ddim_grid(num_steps)) == pytest.approx(w, abs=5e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_short_grid_has_a_solve_weight(num_steps):
    credit = Published()(ddim_grid(num_steps), Ddim(), step_set(num_steps))
    assert credit.solved.any()
    assert credit.steps.std.isfinite().all()


def test_steps_without_a_root_keep_the_posteriors_noise():
    grid = ddim_grid(20)
    credit = Published(solve_weight=4.5)(grid, Ddim(), step_set(20))
    assert where(credit.projected) == [18]  # t = 51, whose weight is 5.43
    assert credit.steps.std[18] == Ddim()(grid).std[18]


def test_less_eta_is_less_of_the_published_noise():
    grid, over = ddim_grid(50), step_set(50)
    whole, half = (Published(solve_weight=4.5)(grid, Ddim(eta), over) for eta in (1.0, 0.5))
    assert_close(half.steps.std, whole.steps.std / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_steps", [8, 20, 50])
def test_the_energy_of_the_exact_reading(num_steps):
    grid = ddim_grid(num_steps)
    energy = solve(grid).steps.std.square().sum() / Ddim()(grid).std.square().sum()
    assert round(energy.item(), 2) == {8: 0.15, 20: 0.25, 50: 0.37}[num_steps]


def test_the_relative_policy_has_a_constant_weight():
    grid = ddim_grid(50)
    credit = Relative()(grid, Ddim(), step_set(50))
    assert_close(
        credit.weight * credit.scale, torch.full((50,), 0.5169002).double(), rtol=0, atol=1e-7
    )
    assert (credit.weight * credit.scale).std() < 1e-10
    assert (round(credit.scale.min().item(), 3), round(credit.scale.max().item(), 3)) == (
        0.158,
        1.382,
    )
    # lambda = w* sigma / C
    a, b = a_and_b(grid)
    std = credit.steps.std.numpy()
    expected = 0.51690016485 * std / (a - np.sqrt(b**2 - std**2))
    np.testing.assert_allclose(credit.scale, expected, rtol=1e-9)


def test_proportionate_is_what_the_authors_run():
    grid, over = ddim_grid(50), step_set(50)
    assert_close(
        Proportionate()(grid, Ddim(), over).steps.std, Published()(grid, Ddim(), over).steps.std
    )
    chosen = Proportionate(solve_weight=4.0)(grid, Ddim(), over)
    assert_close(chosen.steps.std, Published(solve_weight=4.0)(grid, Ddim(), over).steps.std)
    flow, sde = flow_grid(10), FlowSde()
    shared, objective = (kind()(flow, sde, step_set(10)) for kind in (Proportionate, ObjectiveOnly))
    assert_close(shared.credit, objective.credit, rtol=0, atol=0)


# --- the step set of the mean --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Proportionate, ObjectiveOnly, Relative, WeightedLoss])
@pytest.mark.parametrize("first", [0, 3, 6])
def test_in_a_window_the_mean_is_that_of_the_window(kind, first):
    for compile_plan, grid, sde in (
        (plan_diffusion, ddim_grid(8), Ddim()),
        (plan_flow, flow_grid(8), FlowSde()),
    ):
        inside = torch.zeros(8, dtype=torch.bool)
        inside[first : first + 2] = True
        plan = compile_plan(grid, sde, kind(), inside=inside)
        weight = native(grid, sde).weight[inside]
        kept = share(plan)[inside]
        assert where(plan.trained) == [first, first + 1]
        assert_close(kept.sum(), weight.sum(), rtol=1e-12, atol=0)


def test_the_means_step_set_can_be_another():
    grid, weight = ddim_grid(50), native(ddim_grid(50)).weight
    inside = step_set(50, 48)
    means = {"trained": weight[:2], "step_set": weight[:49], "grid": weight}
    for mean_over, of in means.items():
        for kind in (Published, Exact, ObjectiveOnly):
            plan = plan_diffusion(
                grid, Ddim(), kind(), drop_last=1, inside=inside, mean_over=mean_over
            )
            assert where(plan.trained) == [0, 1]
            assert plan.credit[0].item() == pytest.approx(of.mean().item(), rel=1e-12)


def test_the_table_of_credits():
    kinds = (Native, Proportionate, Published, Exact, ObjectiveOnly, Relative, WeightedLoss)
    assert {kind.name: kind for kind in kinds} == CREDITS

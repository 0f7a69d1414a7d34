"""The sampling nodes' own logic, without ComfyUI: scales, grids, noise, the loop."""

from __future__ import annotations

import itertools
import math
import sys
from functools import partial
from types import SimpleNamespace

import comfy_api_fixture
import pytest
import torch
from comfyui_pcpo.nodes import graph, host
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.sampling import credit_plot, grids, sde
from comfyui_pcpo.nodes.sampling import draw as pictures_draw
from comfyui_pcpo.nodes.sampling import nodes as sampling
from comfyui_pcpo.nodes.sampling.noise import stream_noise
from comfyui_pcpo.nodes.sampling.record import Recorder, trajectory_of
from comfyui_pcpo.nodes.sampling.sde import SdeSettings, sample_sde, walk_of
from comfyui_pcpo.pcpo import (
    CREDITS,
    Cps,
    Ddim,
    FlowGrid,
    FlowSde,
    ddim_grid,
    flow_grid,
    native_weights,
    noise_streams,
    plan_diffusion,
    plan_flow,
    rollout,
)
from comfyui_pcpo.pcpo.credit import Native, Proportionate
from comfyui_pcpo.pcpo.plan import deterministic, step_set
from comfyui_pcpo.pcpo.schedules import (
    resolution_shift,
    scaled_linear_alpha_bars,
    shift_sigmas,
    zero_terminal_snr,
)
from comfyui_pcpo.trainers.cli import weights as weights_command
from comfyui_pcpo.trainers.families.registry import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st


class EPS:
    pass


class CONST:
    pass


class Discrete:
    def __init__(self):
        alpha_bars = scaled_linear_alpha_bars()
        self.sigmas = ((1 - alpha_bars) / alpha_bars).sqrt().float()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]


class ModelSamplingFlux:
    shift = 1.15


class DiscreteFlow:
    shift = 3.0


class Sd15(Discrete, EPS):
    pass


class Sd35(DiscreteFlow, CONST):
    pass


class Flux(ModelSamplingFlux, CONST):
    pass


class Stranger(Discrete):
    pass


class ZeroSnr(Sd15):
    """ComfyUI's schedule of a model that ends in pure noise, where it has alpha_bar 4.9e-8."""

    def __init__(self):
        alpha_bars = zero_terminal_snr(scaled_linear_alpha_bars()).clamp(min=4.8973451890853435e-08)
        self.sigmas = ((1 - alpha_bars) / alpha_bars).sqrt().float()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]


SD, SD3, FLUX, ZERO_SNR = Sd15(), Sd35(), Flux(), ZeroSnr()


def model_of(sampling_object) -> SimpleNamespace:
    found = {"model_sampling": sampling_object}.__getitem__
    return SimpleNamespace(get_model_object=found, model=SimpleNamespace())


def scheduled(sampling_object, steps, grid="auto", denoise=1.0) -> torch.Tensor:
    node, model = sampling.PCPOScheduler, model_of(sampling_object)
    return comfy_api_fixture.run(node, model=model, steps=steps, grid=grid, denoise=denoise)[0]


class Network:
    """What KSAMPLER hands to a sampler: here the best denoiser of data from N(2, 0.5^2)."""

    def __init__(self, sampling_object, noise, latent_image=None):
        self.inner_model = SimpleNamespace(
            inner_model=SimpleNamespace(model_sampling=sampling_object)
        )
        self.noise = noise
        self.latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        self.is_flow = isinstance(sampling_object, CONST)
        self.sigmas = []

    def __call__(self, x, sigma, **extra):
        assert sigma.shape == (len(x),)
        self.sigmas.append(float(sigma[0]))
        share = sigma.view(-1, *(1 for _ in x.shape[1:])).double()
        signal = 1 - share if self.is_flow else torch.ones_like(share)
        precision = signal * 0.25 / (signal**2 * 0.25 + share**2)
        return (2 + precision * (x.double() - signal * 2)).to(x.dtype)


def start(network, sigma) -> torch.Tensor:
    """What ComfyUI's noise_scaling makes of an empty latent."""
    full = not network.is_flow and sigma >= SD.sigma_max * (1 - 1e-5)
    return network.noise * ((1 + sigma**2).sqrt() if full else sigma)


def walked(sampling_object, sigmas, noise, seed=0, callback=None, images=None, **chosen):
    network = Network(sampling_object, noise)
    x = start(network, sigmas[0])
    extra = {"seed": seed}
    sample = sample_sde(
        network, x, sigmas, extra, callback, True, settings=SdeSettings(**chosen), images=images
    )
    return sample, network


# --- what a MODEL is -------------------------------------------------------------------------


def test_families_are_told_apart():
    assert [host.family_of(s) for s in (SD, SD3, FLUX)] == ["diffusion", "flow", "flow"]
    with pytest.raises(NodeError, match=r"does not know \(Discrete"):
        host.family_of(Stranger())
    scaled = Sd35()
    scaled.noise_scale = 0.5
    with pytest.raises(NodeError):
        host.family_of(scaled)


def test_shift_is_a_factor_for_all_flow_models():
    assert host.shift_of(SD3) == 3
    assert host.shift_of(FLUX) == pytest.approx(resolution_shift(4096), rel=1e-3)
    with pytest.raises(NodeError, match="no shift"):
        host.shift_of(SD)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 10, 50])
def test_a_grid_survives_the_way_through_sigmas(spacing, steps):
    expected = ddim_grid(steps, spacing=spacing)
    found = host.grid_of(SD, scheduled(SD, steps, spacing))
    torch.testing.assert_close(found.timesteps, expected.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.alpha_bar, expected.alpha_bar, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.alpha_bar_next, expected.alpha_bar_next, rtol=1e-6, atol=0)


def test_timesteps_between_points_of_the_schedule():
    middle = (SD.sigmas[500] * SD.sigmas[501]).sqrt()
    grid = host.grid_of(SD, torch.stack([middle, torch.tensor(0.01), torch.tensor(0.0)]))
    assert grid.timesteps.tolist() == [pytest.approx(500.5, abs=1e-3), 0]
    assert grid.alpha_bar_next[-1] == 1


def test_flow_sigmas_that_miss_1_by_a_rounding_are_1():
    grid = host.grid_of(SD3, torch.tensor([1 - 1e-7, 0.5, 0.0]))
    assert grid.sigmas.tolist() == [1, 0.5, 0]
    assert math.isfinite(float(FlowSde()(grid).std[0]))


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([], "hold 0 values"),
        ([1.0], "hold 1 values"),
        ([0.5, 0.5, 0.0], "begin 0.5, 0.5, 0 and do not fall"),
        ([0.2, 0.7, 0.0], "do not fall"),
        ([0.5, float("nan"), 0.0], "do not fall"),
        ([0.5, -0.1], "do not fall"),
        ([1.2, 0.5, 0.0], "flow MODEL knows noise up to 1"),
    ],
)
def test_sigmas_that_do_not_fit_are_refused(sigmas, says):
    with pytest.raises(NodeError, match=says):
        host.grid_of(SD3, torch.tensor(sigmas))


def test_sigmas_above_a_diffusion_schedule_are_refused():
    host.grid_of(SD, torch.tensor([float(SD.sigma_max) * 1.00001, 1.0]))
    with pytest.raises(NodeError, match=r"up to 14\.61"):
        host.grid_of(SD, torch.tensor([15.0, 1.0]))


# --- PCPO Scheduler --------------------------------------------------------------------------


def test_automatic_grids():
    assert scheduled(SD, 10).equal(scheduled(SD, 10, "leading"))
    assert scheduled(SD3, 10).equal(scheduled(SD3, 10, "flow_match_euler"))
    assert scheduled(FLUX, 10).equal(scheduled(FLUX, 10, "uniform"))
    assert scheduled(ZERO_SNR, 10).equal(scheduled(ZERO_SNR, 10, "trailing"))
    assert scheduled(ZERO_SNR, 10)[0] == ZERO_SNR.sigma_max > 4518


def test_diffusion_sigmas_end_where_the_schedule_does():
    for spacing in ("leading", "trailing"):
        sigmas = scheduled(SD, 10, spacing)
        assert len(sigmas) == 11
        assert sigmas[-1] == SD.sigma_min
    # the last step of linspace stays where it is: it is not taken
    sigmas = scheduled(SD, 10, "linspace")
    assert len(sigmas) == 10
    assert (sigmas[:-1] > sigmas[1:]).all()


def test_flow_sigmas_have_the_models_shift():
    expected = flow_grid(10, kind="flow_match_euler", shift=3.0).sigmas.float()
    assert scheduled(SD3, 10).equal(expected)
    even = torch.linspace(1, 0, 9, dtype=torch.float64)
    expected = shift_sigmas(even, math.exp(1.15)).float()
    torch.testing.assert_close(scheduled(FLUX, 8), expected)


def test_denoise_takes_the_end_of_a_finer_grid():
    part, whole = scheduled(SD, 5, denoise=0.5), scheduled(SD, 10)
    assert part.equal(whole[5:])
    assert len(part) == 6


@pytest.mark.parametrize(
    ("model", "steps", "grid", "says"),
    [
        (SD, 10, "uniform", "choose leading, trailing, linspace or 'auto'"),
        (SD3, 10, "trailing", "choose uniform"),
        (SD, 1001, "auto", "1001 steps are more than the 1000"),
        (SD, 1, "linspace", "at least 2 steps"),
        (Stranger(), 10, "auto", "does not know"),
    ],
)
def test_grids_that_do_not_fit_are_refused(model, steps, grid, says):
    with pytest.raises(NodeError, match=says):
        scheduled(model, steps, grid)


# --- noise -----------------------------------------------------------------------------------


@given(
    steps=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from([4, 16]),
)
@settings(max_examples=40, deadline=None)
def test_initial_noise_is_the_streams_first_draw_for_any_size(steps, height, width, channels):
    if channels * height * width < 16:
        return  # torch fills fewer than 16 numbers in another way
    shape, keys = (channels, height, width), [("sample", 5, 0, j) for j in range(2)]
    expected = noise_streams(keys, steps, shape)
    assert stream_noise(5, range(2), 0, shape).equal(expected[:, :1])
    assert stream_noise(5, range(2), steps, shape).equal(expected)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    noise = comfy_api_fixture.run(sampling.PCPONoise, seed=2**60)[0]
    assert noise.seed == 2**60
    many = noise.generate_noise({"samples": torch.zeros(5, 4, 8, 8)})
    some = noise.generate_noise({"samples": torch.zeros(2, 4, 8, 8), "batch_index": [3, 1]})
    assert some.equal(many[[3, 1]])
    assert not many[0].equal(many[1])


def test_an_empty_batch_is_refused():
    with pytest.raises(NodeError, match="batch is empty"):
        sampling.StreamNoise(0).generate_noise({"samples": torch.zeros(0, 4, 8, 8)})


# --- the sampler -----------------------------------------------------------------------------


def test_widgets_become_settings():
    defaults = {i.id: i.default for i in sampling.PCPOSdeSampler.define_schema().inputs}
    level = sampling.noise_level_of(defaults.pop("noise_level"))
    assert SdeSettings(noise_level=level, **defaults) == SdeSettings()
    # as widgets give it, as a connected number does, and as graphs of before have it
    for said in ("auto", " AUTO", "", -1, -1.0, "-1", -0.5):
        assert sampling.noise_level_of(said) == SdeSettings().noise_level, said
    for said in ("0.7", "0,7", 0.7):
        assert sampling.noise_level_of(said) == 0.7, said
    assert [sampling.noise_level_of(said) for said in (0, "0", 1)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        (sampling.PCPOSdeSampler, {"noise_level": "much"}, "noise_level is 'much'; write a number"),
        (sampling.PCPOSdeSampler, {"noise_level": 11}, "is 11; write a number up to 10, or auto"),
        (sampling.PCPOSdeSampler, {"noise_level": "nan"}, "is 'nan'; write a number up to 10"),
        (credit_plot.PCPOCreditWeights, {"solve_weight": "1 2"}, "solve_weight is '1 2'; write"),
        (credit_plot.PCPOCreditWeights, {"untrained_last_steps": 101}, "number up to 100, or auto"),
        (sampling.PCPOSdeSampler, {"noise_level": "0.7"}, None),
        (sampling.PCPOSdeSampler, {"noise_level": ["3", 0]}, None),
        (credit_plot.PCPOCreditWeights, {"solve_weight": 0.0, "untrained_last_steps": -1}, None),
    ],
)
def test_what_is_no_number_is_said_before_anything_runs(node, inputs, said, monkeypatch):
    sent = {"class_type": node.__name__, "inputs": {"noise_level": "auto"} | inputs}
    graph.remember({"prompt": {"1": sent}})
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="1"))
    answer = node.validate_inputs(sent["inputs"]["noise_level"])
    assert (answer is True) if said is None else said in answer


def test_automatic_transitions_are_the_papers():
    assert [sde.automatic(s) for s in (SD, SD3, FLUX)] == ["ddim", "flow_sde", "dance_sde"]
    kinds = [sde.transition_of(SdeSettings(), s) for s in (SD, SD3, FLUX)]
    assert kinds == [Ddim(1.0), FlowSde(0.7), sde.DanceSde(0.3)]
    assert sde.transition_of(SdeSettings("cps", 0.2), SD3) == Cps(0.2)


def test_a_known_family_has_its_own_sampler_and_grid():
    klein, flux = FAMILIES["klein"], FAMILIES["flux"]
    assert sde.automatic(FLUX, klein) == "flow_sde" and sde.automatic(FLUX, flux) == "dance_sde"
    assert grids.automatic_grid(FLUX, klein) == "inverse_count"
    assert grids.automatic_grid(FLUX, flux) == "uniform" == grids.automatic_grid(FLUX)
    assert sde.automatic(SD, FAMILIES["sdxl"]) == "ddim"


@pytest.mark.parametrize(
    ("model", "chosen", "says"),
    [
        (SD, {"transition": "flow_sde"}, "not for a diffusion MODEL; choose ddim"),
        (FLUX, {"transition": "ddim"}, "not for a flow MODEL; choose dance_sde"),
        (SD, {"noise_level": 1.5}, "noise_level is 1.5 and 'ddim' goes up to 1"),
        (SD3, {"transition": "cps", "noise_level": 2.0}, "'cps' goes up to 1"),
        (SD, {"noise_level": 0.0, "credit": "proportionate"}, "no step carries a policy"),
        (SD3, {"noise_level": 0.0, "credit": "proportionate"}, "no step carries a policy"),
        (Stranger(), {}, "does not know"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_network_runs(model, chosen, says):
    sigmas, noise = torch.tensor([0.9, 0.5, 0.1]), torch.zeros(1, 4, 8, 8)
    network = Network(model, noise)
    with pytest.raises(NodeError, match=says):
        sample_sde(network, noise, sigmas, {}, None, True, settings=SdeSettings(**chosen))
    assert network.sigmas == []


def test_ddim_in_comfyuis_scale():
    # sigma_up = eta sqrt(s'^2 (s^2 - s'^2) / s^2), mean = x0 + sqrt(s'^2 - sigma_up^2) eps
    sigmas = torch.tensor([9.0, 4.0, 1.5, 0.3, 0.0])
    steps = walk_of(SdeSettings("ddim", 0.6), SD, sigmas).host
    for i, (s, after) in enumerate(itertools.pairwise(sigmas.tolist())):
        up = 0.6 * math.sqrt(after**2 * (s**2 - after**2) / s**2)
        along = math.sqrt(after**2 - up**2) / s
        assert steps.push[i] == pytest.approx(up, rel=1e-6)
        assert steps.keep[i] == pytest.approx(along, rel=1e-6, abs=1e-12)
        assert steps.pull[i] == pytest.approx(1 - along, rel=1e-6)


@pytest.mark.parametrize("model", [SD, SD3, FLUX], ids=["sd", "sd3", "flux"])
@pytest.mark.parametrize("transition", ["ddim", "dance_sde", "flow_sde", "cps"])
def test_without_noise_every_sampler_is_euler(model, transition):
    if (transition == "ddim") != (model is SD):
        return
    sigmas = scheduled(model, 6)
    steps = walk_of(SdeSettings(transition, 0.0), model, sigmas).host
    ratio = (sigmas[1:] / sigmas[:-1]).double()
    torch.testing.assert_close(torch.tensor(steps.keep).double(), ratio, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(steps.pull).double(), 1 - ratio, rtol=1e-5, atol=1e-6)
    assert set(steps.push) == {0.0}


@pytest.mark.parametrize("credit", ["native", "proportionate"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_diffusion_latents_are_the_rollouts(credit, spacing):
    noise = stream_noise(3, range(2), 8, (4, 8, 8))
    sigmas = scheduled(SD, 8, spacing)
    found, network = walked(SD, sigmas, noise[:, 0], seed=3, credit=credit)
    grid = ddim_grid(8, spacing=spacing)
    plan = plan_diffusion(grid, Ddim(), CREDITS[credit](), prediction_type="sample")

    def denoiser(x, timestep):  # a network of the method's own scale
        row = (grid.timesteps == timestep).nonzero().item()
        scale = grid.alpha_bar[row].sqrt()
        sigma = ((1 - grid.alpha_bar[row]) / grid.alpha_bar[row]).sqrt()
        return network(x / scale, sigma.expand(len(x)))

    expected = rollout(denoiser, plan, noise.double())
    torch.testing.assert_close(found.double(), expected.final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("credit", "noise_level"),
    [("native", 1.0), ("native", 0.3), ("native", 0.0), ("proportionate", 1.0)],
)
def test_from_pure_noise_latents_are_the_rollouts(credit, noise_level):
    noise = stream_noise(3, range(2), 20, (4, 8, 8))
    chosen = {"credit": credit, "noise_level": noise_level}
    found, network = walked(ZERO_SNR, scheduled(ZERO_SNR, 20), noise[:, 0], seed=3, **chosen)
    bars = zero_terminal_snr(scaled_linear_alpha_bars())
    grid, kind = ddim_grid(20, bars, spacing="trailing"), Ddim(noise_level or 1.0)
    plan = plan_diffusion(grid, kind, CREDITS[credit](), prediction_type="v_prediction")
    plan = plan if noise_level else deterministic(plan, grid, kind, "v_prediction")

    def denoiser(x, timestep):  # v, which is -x0 where there is nothing but noise
        row = (grid.timesteps == timestep).nonzero().item()
        signal, share = (level[row] for level in grid.levels)
        if signal == 0:
            return -network(4518.76 * x, torch.full((len(x),), 4518.76))
        clean = network(x / signal, (share / signal).expand(len(x)))
        return (signal * x - clean) / share

    expected = rollout(denoiser, plan, noise.double()).final
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


class Guider(SimpleNamespace):
    """Stands in for the guider that tells base and tuned models apart, which needs ComfyUI."""


class Guided(Network):
    """What a sampler meets where that guider leads: `tuned` adds to the clean estimate."""

    def __init__(self, sampling_object, noise, tuned):
        super().__init__(sampling_object, noise)
        self.inner_model = Guider(inner_model=self.inner_model.inner_model, tuned=tuned)

    def __call__(self, x, sigma, model_options=None, **extra):
        scale = (model_options or {}).get("scale", 1.0)
        return super().__call__(x, sigma) + scale * self.change(x)

    def change(self, x):
        return 0.3 * x.sin() if self.inner_model.tuned else torch.zeros_like(x)


@pytest.fixture
def guider(monkeypatch):
    stand_in = SimpleNamespace(SCALE="scale", ImplicitRewardGuider=Guider)
    monkeypatch.setitem(sys.modules, "comfyui_pcpo.nodes.guidance.guider", stand_in)


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_relative_latents_are_the_rollouts_of_the_relative_policy(guider, spacing, eta):
    noise = stream_noise(3, range(2), 8, (4, 8, 8))
    sigmas, grid = scheduled(SD, 8, spacing), ddim_grid(8, spacing=spacing)
    network = Guided(SD, noise[:, 0], {0: "a LoRA"})
    chosen = SdeSettings(credit="relative", noise_level=eta)
    start_, extra = start(network, sigmas[0]), {"seed": 3, "model_options": {"other": 1}}
    found = sample_sde(network, start_, sigmas, extra, None, True, settings=chosen)
    assert extra == {"seed": 3, "model_options": {"other": 1}}
    kind = Ddim(eta or 1.0)
    plan = plan_diffusion(grid, kind, CREDITS["relative"](), prediction_type="sample")
    plan = plan if eta else deterministic(plan, grid, kind, "sample")
    assert plan.scale is not None and plan.scale.min() < 0.5 < plan.scale.max()

    def denoiser(x, timestep, tuned=1.0):
        row = (grid.timesteps == timestep).nonzero().item()
        scale = grid.alpha_bar[row].sqrt()
        sigma = ((1 - grid.alpha_bar[row]) / grid.alpha_bar[row]).sqrt()
        told = {"scale": tuned}
        return network(x / scale, sigma.expand(len(x)), model_options=told)

    base = partial(denoiser, tuned=0.0)
    expected = rollout(denoiser, plan, noise.double(), reference=base).final
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    plainly = sample_sde(
        network, start_, sigmas, extra, None, True, settings=SdeSettings(noise_level=eta)
    )
    assert (found - plainly).abs().max() > 1e-2


def test_relative_credit_is_refused_where_no_guider_can_scale(guider):
    noise, sigmas = torch.zeros(1, 4, 8, 8), scheduled(SD, 4)
    for network, says in (
        (Network(SD, noise), "which a SimpleNamespace does not know; sample with PCPO Implicit"),
        (Guided(SD, noise, {}), "has gamma 0; set it to 1 in PCPO Tuned LoRA"),
        (Guided(SD3, noise, {0: "a LoRA"}), "a flow MODEL; choose native or proportionate"),
    ):
        chosen = SdeSettings(credit="relative")
        points = sigmas if network.inner_model.inner_model.model_sampling is SD else sigmas / 20
        with pytest.raises(NodeError, match=says):
            sample_sde(network, noise, points, {}, None, True, settings=chosen)
        assert network.sigmas == []


@pytest.mark.parametrize("transition", ["dance_sde", "flow_sde", "cps"])
def test_flow_latents_are_the_rollouts_up_to_the_last_step(transition):
    noise = stream_noise(3, range(2), 8, (4, 8, 8))
    sigmas = scheduled(SD3, 8)
    found, network = walked(SD3, sigmas[:-1], noise[:, 0], seed=3, transition=transition)
    kind = sde.TRANSITIONS[transition]()
    grid = FlowGrid(flow_grid(8, shift=3.0).sigmas[:-1])
    plan = plan_flow(grid, kind, Native())

    def denoiser(x, sigma):
        return (x - network(x, sigma.expand(len(x)))) / sigma

    expected = rollout(denoiser, plan, noise.double()).final
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_last_step_to_sigma_0_adds_no_noise():
    sigmas = scheduled(SD3, 4)
    found, network = walked(SD3, sigmas, torch.randn(2, 4, 8, 8))
    walk = walk_of(SdeSettings(), SD3, sigmas)
    assert walk.policy.tolist() == [True, True, True, False]
    assert (walk.host.keep[-1], walk.host.pull[-1]) == pytest.approx((0, 1), abs=1e-12)
    assert len(network.sigmas) == 4
    assert found.isfinite().all()


@pytest.mark.parametrize("model", [SD, SD3], ids=["sd", "sd3"])
def test_samples_have_the_datas_moments(model):
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.cat([scheduled(model, 60, "trailing" if model is SD else "uniform")[:-1]])
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    found, _ = walked(model, sigmas, noise, noise_level=0.5)
    assert found.mean() == pytest.approx(2, abs=0.03)
    assert found.std() == pytest.approx(0.5, abs=0.05)


def test_an_image_is_sampled_alike_in_any_batch():
    sigmas = scheduled(SD, 5)
    many = stream_noise(9, range(4), 0, (4, 8, 8))[:, 0]
    batch, _ = walked(SD, sigmas, many, seed=9)
    alone, _ = walked(SD, sigmas, many[2:3], seed=9, images=[2])
    first, _ = walked(SD, sigmas, many[:1], seed=9)
    torch.testing.assert_close(alone, batch[2:3])
    torch.testing.assert_close(first, batch[:1])


def test_the_ends_of_a_schedule():
    noise, sigmas = torch.randn(1, 4, 8, 8), scheduled(SD, 5)
    _, network = walked(SD, sigmas, noise)
    trained, _ = walked(SD, sigmas, noise, noise_level=0.0)
    comfyui, _ = walked(SD, sigmas, noise, noise_level=0.0, ends="as ComfyUI")
    scale = (1 + sigmas[-1] ** 2).sqrt()
    euler = start(network, sigmas[0])
    full = noise * (1 + sigmas[0] ** 2).sqrt()
    for s, after in itertools.pairwise(sigmas):
        euler = euler + (euler - network(euler, s.view(1))) / s * (after - s)
        full = full + (full - network(full, s.view(1))) / s * (after - s)
    torch.testing.assert_close(comfyui, euler, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained, full / scale, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, comfyui, atol=1e-4)


def test_the_first_part_of_a_longer_way_is_not_rescaled():
    noise, sigmas = torch.randn(1, 4, 8, 8), scheduled(SD, 6)
    whole, _ = walked(SD, sigmas, noise, noise_level=0.0)
    part, _ = walked(SD, sigmas[:4], noise, noise_level=0.0)
    network = Network(SD, torch.zeros_like(noise), latent_image=part)
    rest = sample_sde(
        network, part, sigmas[3:], {}, None, True, settings=SdeSettings(noise_level=0.0)
    )
    torch.testing.assert_close(rest, whole)


def test_outside_a_mask_the_image_is_kept_at_the_papers_end():
    image, noise = torch.full((1, 4, 8, 8), 3.0), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 4, 8, 8)
    mask[..., :4] = 1
    network, sigmas = Network(SD, noise, image), scheduled(SD, 5)
    x = image + noise * sigmas[0]
    masked = lambda x, sigma, denoise_mask, seed: network(x, sigma) * mask + image * (1 - mask)  # noqa: E731
    masked.inner_model, masked.noise, masked.latent_image = network.inner_model, noise, image
    extra = {"seed": 1, "denoise_mask": mask}
    found = sample_sde(masked, x, sigmas, extra, None, True, settings=SdeSettings())
    assert found[..., 4:].equal(image[..., 4:])
    assert (found - image)[..., :4].abs().mean() > 0.1


def test_every_step_is_told_and_may_end_the_run():
    told = []

    def callback(step):
        assert step.keys() == {"x", "i", "denoised", "sigma", "sigma_hat"}
        told.append(step["i"])
        if step["i"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walked(SD, scheduled(SD, 10), torch.randn(1, 4, 8, 8), callback=callback)
    assert told == [0, 1, 2]


# --- trajectory ------------------------------------------------------------------------------


def recorded(model, sigmas, walk, seed=4, **chosen):
    noise = stream_noise(seed, range(2), 0, (4, 8, 8))[:, 0]
    shown = []
    record = Recorder(lambda *step: shown.append(step[0]), sigmas.double(), walk)
    count = len(sigmas) - 1

    def callback(step):
        record(step["i"], step["denoised"], step["x"], count)

    final, _ = walked(model, sigmas, noise, seed=seed, callback=callback, **chosen)
    assert shown == list(range(count))
    return trajectory_of(record, final, lambda x: x * 10, seed, [0, 1]), final


@pytest.mark.parametrize("model", [SD, SD3], ids=["sd", "sd3"])
def test_a_trajectory_is_what_the_method_would_keep(model):
    sigmas = scheduled(model, 5)
    walk = walk_of(SdeSettings(), model, sigmas)
    way, final = recorded(model, sigmas, walk)
    assert way.clean.shape == (2, 5, 4, 8, 8)
    last = way.policy.clean.float() * 10
    torch.testing.assert_close(way.clean[:, -1].float(), last, rtol=1e-3, atol=0)  # float16
    torch.testing.assert_close(way.policy.final.float(), final, rtol=1e-3, atol=1e-3)
    steps, policy = walk.steps, way.policy
    natural = "epsilon" if model is SD else "velocity"
    mean_x, mean_p = steps.in_terms_of(host.PREDICTIONS[natural](*walk.grid.levels))
    for k, i in enumerate(policy.step.tolist()[:-1]):
        x, prediction, noise = (
            t[:, k].double() for t in (policy.x, policy.prediction, policy.noise)
        )
        after = mean_x[i] * x + mean_p[i] * prediction + steps.std[i] * noise
        torch.testing.assert_close(policy.x[:, k + 1].double(), after, rtol=0, atol=0.01)


def test_other_samplers_leave_their_clean_estimates_alone():
    way, _ = recorded(SD, scheduled(SD, 3), None)
    assert way.policy is None
    assert len(way) == 2


def test_a_sampler_that_tells_nothing_is_refused():
    record = Recorder(lambda *_: None, torch.zeros(2), None)
    with pytest.raises(NodeError, match="tells nothing"):
        trajectory_of(record, torch.zeros(1), lambda x: x, 0, [0])


# --- pictures --------------------------------------------------------------------------------


MODELS = {"model", "sigmas"}


def credit_weights(model, sigmas, **chosen):
    node = credit_plot.PCPOCreditWeights
    return comfy_api_fixture.run(node, model=model_of(model), sigmas=sigmas, **chosen)


def rows_of(table) -> list[list[str]]:
    """The lines of the steps: number, point, native, credit, noise, new noise, true, mark."""
    return [
        row
        for row in map(str.split, table.splitlines())
        if row[0].isdecimal() and row[1] != "steps"
    ]


def test_the_table_has_the_papers_numbers():
    image, table = credit_weights(SD, scheduled(SD, 50)).args
    assert image.shape[0] == 1
    assert image.shape[-1] == 3
    assert 0 <= image.min() < 0.5 < image.max() <= 1
    rows, (title, _, *_, true, sums, solved, energy) = rows_of(table), table.splitlines()
    assert title.startswith("proportionate credit (published, larger root, w 4.5): ddim, 50 ")
    assert true == "true weight    min 0.385021  max 3.368360"
    assert energy == "noise energy 1.258 of DDPM's (sum of std^2)"
    assert len(rows) == 50
    native = [float(row[2]) for row in rows]
    assert min(native) == pytest.approx(0.374150, abs=2e-6)
    assert max(native) == pytest.approx(3.274788, rel=1e-4)
    assert float(rows[0][3]) == pytest.approx(0.5169002, abs=2e-6)
    assert float(sums.split()[2]) == pytest.approx(float(sums.split()[4]), rel=1e-6)
    assert solved == "solved 50 steps, projected 0"


@pytest.mark.parametrize(
    ("chosen", "title", "true", "energy"),
    [
        ({"credit": "published", "solve_weight": 4.5}, "larger root, w 4.5", (0.385, 3.368), 1.258),
        ({"credit": "published", "solve_weight": 6.0}, "larger root, w 6", (0.375, 3.909), 0.739),
        ({"credit": "exact"}, "exact credit: ddim", (0.517, 3.275), 0.366),
        ({"credit": "objective_only"}, "objective_only credit: ddim", (0.374, 3.275), 1.0),
        ({"credit": "relative"}, "relative credit: ddim", (0.517, 0.517), 1.0),
    ],
    ids=lambda value: value.get("credit") if isinstance(value, dict) else "",
)
def test_each_credit_of_ddim_has_its_own_table_and_picture(chosen, title, true, energy):
    sigmas = scheduled(SD, 50)
    image, table = credit_weights(SD, sigmas, **chosen).args
    first, *_, last = table.splitlines()
    assert title in first
    shown = [float(row[6]) for row in rows_of(table)]
    assert (min(shown), max(shown)) == pytest.approx(true, abs=1e-3)
    assert float(last.split()[2]) == pytest.approx(energy, abs=2e-3)
    assert {row[3] for row in rows_of(table)} == {"0.516900"}
    assert ("lambda         min 0.157842  max 1.381533" in table) == (
        chosen["credit"] == "relative"
    )
    native, _ = credit_weights(SD, sigmas).args
    assert not image.equal(native)


def test_workflows_of_before_mean_what_they_meant():
    widgets = [
        i for i in credit_plot.PCPOCreditWeights.define_schema().inputs if i.id not in MODELS
    ]
    assert [i.id for i in widgets[-2:]] == ["credit", "solve_weight"]
    assert [(i.default, i.optional) for i in widgets[-2:]] == [
        ("proportionate", True),
        ("auto", True),
    ]
    before = (model_of(SD), scheduled(SD, 20), "auto", -1.0, -1)
    _, table = credit_plot.PCPOCreditWeights.execute(*before).args
    assert credit_plot.PCPOCreditWeights.execute(*before, solve_weight=0.0).args[1] == table
    assert credit_plot.PCPOCreditWeights.execute(*before[:3], "auto", "auto").args[1] == table
    grid = host.grid_of(SD, scheduled(SD, 20))
    theirs = Proportionate()(grid, Ddim(), step_set(20))
    stds = torch.tensor([float(row[5]) for row in rows_of(table)]).double()
    torch.testing.assert_close(stds, theirs.steps.std, rtol=0, atol=1e-6)


def test_pure_noise_has_no_part_in_the_mean():
    sigmas = scheduled(ZERO_SNR, 10)
    _, table = credit_weights(ZERO_SNR, sigmas, credit="relative").args
    grid = ddim_grid(10, zero_terminal_snr(scaled_linear_alpha_bars()), spacing="trailing")
    theirs = CREDITS["relative"]()(grid, Ddim(), step_set(10))
    assert rows_of(table)[0][2] == "inf"
    plan = plan_diffusion(grid, Ddim(), CREDITS["relative"](), prediction_type="v_prediction")
    said = f"step 0 starts from pure noise: infinite in eps, {plan.credit[0]:.6f} in v"
    assert said in table and plan.weight[0] == plan.credit[0] > 0
    assert "pure noise" not in credit_weights(SD, scheduled(SD, 10, "trailing"))[1]
    assert float(rows_of(table)[1][3]) == pytest.approx(float(theirs.share[1]), rel=1e-4)
    walk = walk_of(SdeSettings(credit="relative"), ZERO_SNR, sigmas)
    assert walk.scale == pytest.approx(theirs.scale.tolist(), rel=1e-3)


def test_flow_leaves_its_last_step_out():
    _, table = credit_weights(SD3, scheduled(SD3, 10)).args
    rows = rows_of(table)
    assert table.startswith("proportionate credit: flow_sde, 10 steps, 9 trained")
    assert "energy" not in table
    assert float(rows[9][2]) == pytest.approx(1.7706, abs=1e-4)
    assert rows[9][-2:] == ["not", "trained"]
    zeta = float(rows[1][3]) / (0.9601 - 0.9133)
    assert zeta == pytest.approx(3.9702, rel=2e-3)
    _, all_steps = credit_weights(SD3, scheduled(SD3, 10), untrained_last_steps=0).args
    assert "not trained" not in all_steps
    _, alone = credit_weights(SD3, scheduled(SD3, 10), credit="objective_only").args
    assert rows_of(alone) == rows


def test_the_weights_are_the_commands():
    over = step_set(20)
    grid = host.grid_of(SD, scheduled(SD, 20))
    native, credited = credit_plot.credits_of(grid, Ddim(), 0, Proportionate())
    arguments = weights_command.WeightsArguments(steps=20)
    case = weights_command.case_of(arguments)
    theirs = Native()(case.grid, case.transition, over)
    torch.testing.assert_close(native.weight, theirs.weight, rtol=1e-4, atol=0)
    theirs = Proportionate()(case.grid, case.transition, over)
    torch.testing.assert_close(credited.credit, theirs.credit, rtol=1e-5, atol=0)
    torch.testing.assert_close(native_weights(grid, native.steps), native.weight)


@pytest.mark.parametrize(
    ("model", "chosen", "says"),
    [
        (SD, {"transition": "cps"}, "choose ddim"),
        (SD, {"untrained_last_steps": 4}, "4 of 4 steps"),
        (SD, {"noise_level": 0.0}, "no step carries a policy"),
        (
            SD,
            {"credit": "exact", "noise_level": 0.5},
            "is 0.5, but credit 'exact' .*; set it to auto",
        ),
        (SD, {"credit": "exact", "solve_weight": 4.5}, "'exact' on ddim .*; set it to auto"),
        (SD, {"credit": "relative", "solve_weight": 4.5}, "'relative' on ddim .*; set it to auto"),
        (SD, {"credit": "published", "solve_weight": 0.1}, "weight is 0.1, .* begin at"),
        (SD3, {"credit": "published"}, "'published' changes DDIM's noise; on flow take 'prop"),
        (SD3, {"credit": "exact"}, "'exact' changes DDIM's noise; on flow take 'prop"),
        (SD3, {"solve_weight": 4.5}, "'proportionate' on flow_sde solves .*; set it to auto"),
    ],
)
def test_weights_that_cannot_be_are_refused(model, chosen, says):
    with pytest.raises(NodeError, match=says):
        credit_weights(model, scheduled(model, 4), **chosen)


def test_without_matplotlib_the_picture_says_what_to_install(monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(comfy_api_fixture.sys.modules, name, None)
    with pytest.raises(NodeError, match=r"pip install .*matplotlib`"):
        credit_weights(SD, scheduled(SD, 4))


@pytest.mark.parametrize(
    ("count", "frames", "chosen"),
    [(10, 3, [0, 4, 9]), (3, 8, [0, 1, 2]), (5, 1, [4]), (1, 4, [0]), (50, 2, [0, 49])],
)
def test_frames_are_spread_evenly(count, frames, chosen):
    assert credit_plot.chosen_steps(count, frames) == chosen


def test_a_strip_is_one_sheet_an_image():
    class Vae:
        def decode(self, latents):
            assert latents.dtype == torch.float32
            pictures_ = (latents[:, :3] / 20 - 1 / 2).movedim(1, -1)
            return pictures_.repeat_interleave(8, 1).repeat_interleave(8, 2)

    way, _ = recorded(SD, scheduled(SD, 5), None)
    sheets = comfy_api_fixture.run(
        credit_plot.PCPOTrajectoryStrip, trajectory=way, vae=Vae(), frames=3
    )[0]
    assert sheets.shape[0] == 2
    assert not sheets[0].equal(sheets[1])
    one = comfy_api_fixture.run(
        credit_plot.PCPOTrajectoryStrip, trajectory=way, vae=Vae(), frames=1
    )[0]
    assert one.shape[2] < sheets.shape[2]


def test_a_strip_draws_each_frame_where_its_label_is():
    frames = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    frames[1] = 255
    sheet = pictures_draw.strip(frames, [("step 1", "sigma 9"), ("step 2", "sigma 0.1")])
    left, right = sheet[0].chunk(2, dim=1)
    assert left[40:100, 40:100].max() == 0
    assert right[40:100, 40:100].min() == 1

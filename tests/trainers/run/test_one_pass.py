"""One pass against two: the same images to the bit, the same gradient, or a refusal."""

from __future__ import annotations

from typing import Any

import flux_fixture
import pytest
import torch
from comfyui_pcpo.trainers.bench.iteration import one_iteration
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig, validate
from comfyui_pcpo.trainers.errors import Stopped
from comfyui_pcpo.trainers.families import Family
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run import start
from comfyui_pcpo.trainers.run.control import Control
from comfyui_pcpo.trainers.run.iteration import requests_of
from comfyui_pcpo.trainers.run.setup import prepare
from comfyui_pcpo.trainers.run.update import one_pass
from comfyui_pcpo.trainers.run.update.learner import Learner, summarise
from sd1_fixture import write_folder

CONVOLUTIONS = ["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv2", "time_emb_proj"]
GUIDED = {"sampler.guidance_scale": 3.0}
KL = {"method.kl_weight": 0.1}
FLOW = {"sampler.transition": "flow_sde", "sampler.noise_level": 0.7, "sampler.drop_last": 1}
SHORT = {"model.t5_length": 16}  # of FLUX's 512 tokens

SD: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear and conv": {"trainable.targets": CONVOLUTIONS, "optimizer.updates": 1},
    "guided, KL": {**GUIDED, **KL, "model.gradient_checkpointing": True},
    "conditional": {
        **GUIDED,
        "sampler.guidance_gradient": "conditional",
        "method.selection": "random_fraction",
        "trainable.targets": CONVOLUTIONS,
        "model.gradient_checkpointing": True,
    },
    "baseline": {
        "method.credit": "native",
        "method.ratio": "density",
        "method.objective": "ppo_clip",
        "method.loss_scale": 2.0,
        "sampler.noise_level": 0.5,
        "run.store_on": "cpu",
    },
    "KL of some steps": {**GUIDED, **KL, "method.kl_fraction": 0.5},
    "window of steps": {"method.selection": "sliding_window", "method.window": 2},
    "relative": {"method.credit": "relative", **GUIDED},
    "relative, KL": {"method.credit": "relative", **KL, "optimizer.updates": 1},
    "group by group": {"advantage.kind": "group", "run.micro_batch": 2},
    "branches": {"sampler.branches": 2, "sampler.branch_at": [2], **KL, "run.micro_batch": 1},
    "branches of a random part": {
        **{"sampler.branches": 2, "sampler.branch_at": [1], "run.micro_batch": 1},
        **{"method.selection": "random_fraction", "method.fraction": 0.5},
    },
    "window with branches": {
        **{"method.selection": "sliding_window", "method.window": 2, "sampler.branches": 2},
        **{"method.window_move": "fixed", "method.window_start": 1, "run.micro_batch": 1},
        **{"advantage.kind": "group", "advantage.among": "siblings"},
    },
    "rounded": {"run.storage": "bfloat16", "sampler.initial_noise": "prompt"},
}
TRANSFORMER: dict[str, dict[str, Any]] = {
    "KL": {**FLOW, **KL, "method.kl": "without_interval"},
    "checkpointing": {**FLOW, "model.gradient_checkpointing": True},
    "guard": {**FLOW, "method.ratio": "guard", "method.credit": "native"},
    "cps": {
        "sampler.transition": "cps",
        "sampler.drop_last": 1,
        "method.ratio": "squared_error",
        "method.credit": "native",
        **KL,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    flux = flux_fixture.write_folder(root / "flux", vae="tiny")
    return {"sd": write_folder(root / "sd", vae="tiny"), "flux": flux, "flow": "demo-flow"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\na dog\na bird\n", encoding="utf-8")
    return file


def config_of(source: Any, prompts: Any, way: str, changes: dict[str, Any]) -> TrainConfig:
    values: dict[str, Any] = {
        "rewards": {"jpeg_incompressibility": 1.0},
        "model": {"source": str(source), "width": 64, "height": 64},
        "sampler": {"steps": 4},
        "trainable": {"rank": 2},
        "method": {"update": way},
        "advantage": {"kind": "batch"},
        "prompts": {"source": str(prompts), "per_iteration": 3, "images_per_prompt": 2},
        "optimizer": {"updates": 1},
        "run": {"micro_batch": 4, "eval_prompts": 0},
    }
    for name, value in changes.items():
        section, field = name.split(".")
        values[section][field] = value
    return validate(values, "test")


class Seen:
    """One iteration's gradient, latents and metrics, of adapters that do something already."""

    def __init__(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        setup = prepare(config)
        generator = torch.Generator().manual_seed(5)
        for parameter in setup.learner.parameters:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        self.gradient: list[torch.Tensor] = []
        self.latents: list[torch.Tensor] = []

        def step(learner: Learner, done: int, sums: torch.Tensor) -> dict[str, Any]:
            self.gradient += [p.grad.clone() for p in learner.parameters]
            learner.optimizer.zero_grad()
            return summarise(learner.sum_over_processes(sums)) | {"grad_norm": 1.0}

        kind: Any = type(setup.family)
        decode = kind.decode

        def decoded(family: Family, latents: torch.Tensor) -> torch.Tensor:
            self.latents += list(latents)
            return decode(family, latents)

        with monkeypatch.context() as patched:
            patched.setattr(Learner, "step", step)
            patched.setattr(kind, "decode", decoded)
            self.line = one_iteration(setup)

    def images(self) -> torch.Tensor:
        """Distinct latents, whatever their order: some only fill a micro-batch up."""
        return torch.unique(torch.stack(self.latents).flatten(1), dim=0)


def assert_same_update(source: Any, prompts: Any, changes: dict[str, Any], monkeypatch: Any):
    two, one = (
        Seen(config_of(source, prompts, way, changes), monkeypatch)
        for way in ("two_pass", "one_pass")
    )
    assert len(two.images()) == 6
    assert torch.equal(one.images(), two.images())
    want, found = (torch.cat([g.flatten() for g in seen.gradient]) for seen in (two, one))
    assert (found - want).norm() <= 1e-5 * want.norm() > 0
    same = ("reward", "loss", "kl", "clip_fraction", "outside_fraction", "log_ratio_histogram")
    for name in (*same, "log_ratio_max", "log_ratio", "log_ratio_std"):
        assert one.line[name] == pytest.approx(two.line[name], rel=1e-4, abs=1e-6), name
    assert one.line["clip_fraction"] == one.line["log_ratio_max"] == 0
    assert one.line["kl"] > 0 or "method.kl_weight" not in changes


@pytest.mark.parametrize("changes", SD.values(), ids=SD)
def test_sd_learns_the_same(models, prompts, changes, monkeypatch):
    assert_same_update(models["sd"], prompts, changes, monkeypatch)


CONDITIONAL = {**GUIDED, "sampler.guidance_gradient": "conditional"}
"""Both branches run apart where they are trained, and in one batch elsewhere."""


@pytest.mark.parametrize(
    "changes",
    [
        {**KL, "method.selection": "random_fraction"},
        {"method.selection": "sliding_window", "method.window": 2},
        {"method.credit": "relative"},
    ],
    ids=["KL", "window", "relative"],
)
def test_what_is_trained_runs_as_in_the_rollout_though_batches_round(
    models, prompts, changes, monkeypatch
):
    passes = []

    def rounds(kind: Any) -> None:
        predict = kind.predict

        def rounded(family: Family, latents: Any, *rest: Any) -> torch.Tensor:
            passes.append((len(latents), torch.is_grad_enabled()))
            return predict(family, latents, *rest) + 1e-3 * len(latents)

        monkeypatch.setattr(kind, "predict", rounded)

    rounds(type(prepare(config_of(models["sd"], prompts, "two_pass", {})).family))
    assert_same_update(models["sd"], prompts, {**CONDITIONAL, **changes}, monkeypatch)
    assert set(passes) == {(4, True), (4, False), (8, False)}  # micro-batches of 4


@pytest.mark.parametrize("changes", TRANSFORMER.values(), ids=TRANSFORMER)
def test_flux_learns_the_same(models, prompts, changes, monkeypatch):
    assert_same_update(models["flux"], prompts, changes | SHORT, monkeypatch)


@pytest.mark.parametrize("gradient", ["both", "conditional"])
def test_the_demo_flow_model_learns_the_same_with_guidance_and_kl(models, gradient, monkeypatch):
    changes = {**FLOW, **KL, **GUIDED, "sampler.guidance_gradient": gradient}
    assert_same_update(models["flow"], "scenes", changes, monkeypatch)


def test_weighted_terms_pull_on_policy_as_shares_in_the_ratio_do(models, prompts, monkeypatch):
    ways = [("weighted_loss", "density"), ("objective_only", "epsilon_matching")]
    gradients = []
    for credit, ratio in ways:
        changes = {"method.credit": credit, "method.ratio": ratio}
        seen = Seen(config_of(models["sd"], prompts, "two_pass", changes), monkeypatch)
        gradients.append(torch.cat([g.flatten() for g in seen.gradient]))
    weighted, shared = gradients
    assert (weighted - shared).norm() <= 1e-4 * shared.norm() > 0


# --- a prompt that occurs twice ------------------------------------------------------------------

THRICE = ["a cat", "a dog", "a cat", "a cat"]


def gradient_of(source: Any, prompts: Any, way: str, micro_batch: int, monkeypatch: Any):
    changes = {
        "advantage.kind": "group",
        "prompts.per_iteration": 4,
        "prompts.images_per_prompt": 2,
        "run.micro_batch": micro_batch,
    }
    seen = Seen(config_of(source, prompts, way, changes), monkeypatch)
    assert len(seen.images()) == 8  # equal lines have images of their own
    return torch.cat([g.flatten() for g in seen.gradient])


def test_equal_lines_are_one_group_whatever_the_batching(models, tmp_path, monkeypatch):
    """Shuffled, one prompt is asked for first, third and last, another between."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(THRICE), encoding="utf-8")
    want = gradient_of(models["sd"], file, "two_pass", 4, monkeypatch)
    for micro_batch in (1, 2, 3, 4, 12):
        found = gradient_of(models["sd"], file, "one_pass", micro_batch, monkeypatch)
        # a pixel at the edge of rounding moves the reward: 0.003; groups by line were 0.5 apart
        assert (found - want).norm() <= 0.02 * want.norm() > 0, micro_batch


# --- several updates -----------------------------------------------------------------------------


def test_each_update_samples_its_own_prompts(models, prompts):
    """Two updates of one iteration are two iterations of half the prompts."""
    config = config_of(models["sd"], prompts, "one_pass", {"optimizer.updates": 3})
    parts = one_pass.parts_of(config)
    assert parts == [[0, 1], [2, 3], [4, 5]]
    config = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"updates": 2, "lr": 1e-2})}
    )
    assert one_pass.parts_of(config) == [[0, 1, 2, 3], [4, 5]]
    setup, moved = prepare(config), prepare(config)
    line = one_iteration(setup)
    assert len(line["grad_norms"]) == 2 and min(line["grad_norms"]) > 0
    assert line["log_ratio_max"] == line["clip_fraction"] == 0  # on policy, both
    # the second update's images are the updated policy's
    requests = requests_of(setup.config, len(setup.prompts), 0)
    before = moved.sampler(requests[:4] + requests[:2]).images[:4]
    later = moved.sampler(requests[2:]).images[2:4]
    rewards = moved.reward_set.score(torch.cat([before, later]), ["x"] * 6)
    assert line["reward"] != pytest.approx(rewards.mean().item(), abs=1e-7)


def test_units_are_whole_prompts_that_fill_the_processes(models, prompts):
    changes = {"advantage.kind": "group", "run.micro_batch": 2, "prompts.order": "random"}
    config = config_of(models["sd"], prompts, "one_pass", changes)
    texts = ["a dog", "a dog", "a bird", "a bird", "a cat", "a cat"]
    again = [*texts[:4], "a dog", "a dog"]
    part = list(range(6))
    assert one_pass.units_of(config, part, again, 1) == [[0, 1, 4, 5], [2, 3]]  # equal prompts meet
    assert one_pass.units_of(config, part, texts, 1) == [[0, 1], [2, 3], [4, 5]]
    assert one_pass.units_of(config, part, texts, 2) == [[0, 1, 2, 3], [4, 5]]
    for waits in ({"advantage.global_std": True}, {"advantage.kind": "batch"}):
        other = config_of(models["sd"], prompts, "one_pass", {**changes, **waits})
        assert one_pass.units_of(other, part, again, 1) == [part]


# --- a whole run ---------------------------------------------------------------------------------

DEMO = ("demo", "--model", "tiny-sd")
RUN = [
    *("--method.update", "one_pass", "--run.iterations", "2", "--run.eval-prompts", "2"),
    *("--run.eval-steps", "2", "--sampler.steps", "4", "--prompts.per-iteration", "2"),
    *("--prompts.images-per-prompt", "3", "--run.micro-batch", "4"),
]


def test_a_run_says_so_and_averages(tmp_path, capsys):
    options = ["--trainable.ema-decay", "0.5", "--method.kl-weight", "0.1"]
    assert main([*DEMO, "--out", str(tmp_path / "run"), *RUN, *options]) == 0
    said = capsys.readouterr().out
    assert said.count("one pass: each step is learnt as it is taken") == 1
    lines = JobFolder(tmp_path / "run").metrics()
    assert all(line["kl"] > 0 for line in lines[1:])
    assert all(line["seconds_update"] < line["seconds_rollout"] for line in lines)
    assert all(line["log_ratio_max"] == 0 and line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainable.kind": "full"}, "trainable.kind is 'full'"),
        ({"optimizer.updates": 4}, "each update has prompts of its own"),
        (
            {"run.storage": "bfloat16", "run.storage_rounding": "after"},
            "run.storage_rounding is 'after'",
        ),
    ],
)
def test_refused_with_the_reason(models, prompts, changes, said):
    with pytest.raises(ConfigError, match="one_pass") as error:
        config_of(models["sd"], prompts, "one_pass", changes)
    assert said in str(error.value)
    changed = dict(changes)
    changed.pop("optimizer.updates", None)
    config_of(models["sd"], prompts, "two_pass", changed)  # which may


def test_a_stop_between_two_updates_drops_the_iteration(models, prompts, tmp_path, monkeypatch):
    changes = {"optimizer.updates": 2, "run.micro_batch": 2, "run.iterations": 2}
    config = config_of(models["sd"], prompts, "one_pass", changes | {"run.save_every": 2})
    start.train(config, tmp_path / "straight")
    steps, step = [], Learner.step

    def counted(*given: Any) -> dict[str, Any]:
        steps.append(given)
        return step(*given)

    def check(self: Control) -> None:
        if len(steps) == 3:  # the first update of the second iteration is made
            raise Stopped("stopped by a signal")

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", counted)
        patched.setattr(Control, "check", check)
        with pytest.raises(Stopped):
            start.train(config, tmp_path / "cut")
    assert len(steps) == 3
    start.resume(tmp_path / "cut")
    straight, cut = (
        (tmp_path / name / "lora" / "pcpo_00002.safetensors").read_bytes()
        for name in ("straight", "cut")
    )
    assert cut == straight

"""Numbers that are not finite stop the work where they arise, and leave nothing broken behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.finite import Diverged
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run import checkpoint
from comfyui_pcpo.trainers.run.iteration import _mean
from comfyui_pcpo.trainers.run.update.learner import Learner
from safetensors.torch import load_file, save_file

SMALL = [
    *("--run.iterations", "3", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "3", "--method.selection", "all", "--run.micro-batch", "4"),
    *("--run.save-every", "3", "--run.eval-prompts", "2", "--run.eval-steps", "2"),
]
GROUPS = ("--advantage.kind", "group")
FLOW = ("--model.source", "demo-flow", "--sampler.transition", "flow_sde")
WAYS = {
    "lora": (),
    "full": ("--trainable.kind", "full", "--trainable.ema-decay", "0.9"),
    "one pass": ("--method.update", "one_pass", *GROUPS),
    "flow": (*FLOW, "--trainable.kind", "full"),
}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(root: Path, *options: str) -> int:
    return main(["train", "--preset", "demo", "--out", str(root), *SMALL, *options])


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_nothing_is_broken(root: Path) -> None:
    for file in root.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), f"{file}: {name}"
    for file in root.rglob("*.json"):
        strict(file.read_text(encoding="utf-8"))
    for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        strict(line)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_training_that_diverges_ends_with_a_reason(tmp_path, capsys, options):
    root = tmp_path / "run"
    assert train(root, "--optimizer.lr", "1e6", "--optimizer.updates", "1", *options) == 2
    status, said = JobFolder(root).read("status.json"), capsys.readouterr().err.strip()
    assert status["state"] == "failed" and "lower optimizer.lr (1e+06)" in status["message"]
    assert "iteration" in said and "\n" not in said, said
    assert_nothing_is_broken(root)


@pytest.mark.parametrize("part", ["gradient", "loss", "weights", "moments", "average"])
def test_an_update_that_breaks_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, part):
    """The second of two updates of the second iteration, with one checkpoint to keep."""
    step = Learner.step

    def broken(learner, done, *rest):
        if done == 3:
            BREAKS[part](learner, *rest)
        return step(learner, done, *rest)

    monkeypatch.setattr(Learner, "step", broken)
    root, ema = tmp_path / "run", ("--trainable.ema-decay", "0.9")
    assert train(root, "--optimizer.updates", "2", "--run.keep-checkpoints", "1", *ema) == 2
    said = capsys.readouterr().err
    assert "iteration 2, update 2 of 2" in said and "lower optimizer.lr" in said, said
    assert "what was saved up to iteration 1 is good" in said
    kept = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert "00001" in kept and "00002" not in kept and len(JobFolder(root).metrics()) == 1
    assert_nothing_is_broken(root)


def _after_the_step(change):
    def broken(learner, *_):
        plain = learner.optimizer.optimizer
        plain.register_step_post_hook(lambda optimizer, *_: change(learner, optimizer))

    return broken


def _break(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1)[0] = float("inf")


BREAKS = {
    "gradient": lambda learner, *_: _break(learner.parameters[0].grad),
    "loss": lambda learner, sums: _break(sums[2:]),
    "weights": _after_the_step(lambda learner, _: _break(learner.parameters[0])),
    "moments": _after_the_step(
        lambda learner, optimizer: _break(optimizer.state[learner.parameters[-1]]["exp_avg_sq"])
    ),
    "average": _after_the_step(lambda learner, _: _break(learner.averaged.weights[-1])),
}


def test_resume_passes_over_a_checkpoint_with_numbers_that_are_not_finite(tmp_path, capsys):
    """As an earlier version wrote them: the newest one is whole by its checksum, and broken."""
    root = tmp_path / "run"
    assert train(root) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = tmp_path / "whole"
    shutil.copytree(root, whole)
    newest = root / "checkpoints" / "00003"
    tensors = load_file(newest / checkpoint.TENSORS)
    tensors["parameter.1"][0, 0] = float("nan")
    save_file(tensors, newest / checkpoint.TENSORS)
    state = json.loads((newest / checkpoint.STATE).read_text())
    state["checksum"] = checkpoint.checksum(newest / checkpoint.TENSORS)
    (newest / checkpoint.STATE).write_text(json.dumps(state))
    capsys.readouterr()
    assert main(["resume", str(root)]) == 0
    said = capsys.readouterr().out
    assert "00003 is damaged (parameter.1 is not finite) and passed over" in said
    assert "going on after iteration 2" in said
    assert_nothing_is_broken(root)
    export = Path("lora", "pcpo_00003.safetensors")
    assert (root / export).read_bytes() == (whole / export).read_bytes()


def test_a_stale_checkpoint_after_the_present_one_is_never_kept_in_its_place(tmp_path):
    folder = JobFolder(tmp_path)
    for i in range(1, 6):
        (folder.checkpoints / f"{i:05}").mkdir(parents=True)
    checkpoint._prune(folder, 1, checkpoint.Position(3))  # 4 and 5 were passed over
    assert [path.name for path in folder.checkpoints.iterdir()] == ["00003"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_number_that_is_not_finite(tmp_path, value):
    folder = JobFolder(tmp_path)
    write_json(tmp_path / "x.json", {"a": [value, 1.5]})
    folder.add_metrics({"iteration": 1, "reward": value})
    assert strict((tmp_path / "x.json").read_text()) == {"a": [None, 1.5]}
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"iteration": 1, "reward": None}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_a_setting_has_to_be_finite(tmp_path, capsys, value):
    (tmp_path / "run.toml").write_text(f"[optimizer]\nlr = {value}\n")
    for words in (
        ["train", "--preset", "demo", "--optimizer.lr", value],
        ["sample", "--guidance-scale", value],
        ["weights", "--target", value],
        ["train", str(tmp_path / "run.toml")],
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert "finite" in capsys.readouterr().err, words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scale", "is_over"), [(65536.0, False), (1.0, True), (None, True)])
def test_float16_leaves_steps_out_until_its_scale_is_spent(scale, is_over):
    """Scaled gradients are too large now and then: the scaler leaves the step out by itself."""
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    config = TrainConfig()
    accelerator = SimpleNamespace(scaler=scaler)
    learner = SimpleNamespace(config=config, processes=SimpleNamespace(accelerator=accelerator))
    means = {"loss": 0.1, "log_ratio_histogram": [], "grad_norm": float("inf")}
    if not is_over:
        return Learner._check_means(learner, 5, means)
    with pytest.raises(Diverged, match="iteration 3, update 2 of 2: the norm of the grad"):
        Learner._check_means(learner, 5, means)
    means = {"loss": float("nan"), "grad_norm": 1.0}
    with pytest.raises(Diverged, match="the loss is nan"):
        Learner._check_means(learner, 5, means)
    assert _mean([None, 1.0, 3.0]) == 2 and _mean([None]) is None


def test_a_run_without_held_out_prompts_says_so(tmp_path, capsys):
    options = ("--run.iterations", "1", "--run.eval-prompts", "0", "--prompts.per-iteration", "1")
    assert train(tmp_path / "run", *options, "--optimizer.updates", "1") == 0
    said = capsys.readouterr().out + JobFolder(tmp_path / "run").read("status.json")["message"]
    assert "nan" not in said and said.count("no held-out prompts") == 2

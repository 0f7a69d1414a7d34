"""One run in one, two or three processes: the same samples, rewards and weights, and one end.

Processes meet over gloo on the CPU, started by the real command line or by torchrun. Sums of
gradients are rounded in another order in each case; eps 1 makes Adam a plain gradient step, which
does not amplify that, and the weights then agree to 1e-6.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.distributed.launcher import check_devices, processes
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run.setup import check_split
from comfyui_pcpo.trainers.taste.learn import refit
from http_fixture import RewardServer
from processes_fixture import recorded
from safetensors.torch import load_file
from taste_fixture import still_open, voted
from warm_fixture import Process, pcpo, started

FIXTURES = Path(__file__).parents[2] / "fixtures"
PLAIN = [*("--optimizer.eps", "1", "--optimizer.lr", "1", "--optimizer.weight-decay", "0")]
SMALL = [  # ten images: not divisible by three
    *("--preset", "demo", "--run.iterations", "2", "--run.micro-batch", "4"),
    *("--prompts.per-iteration", "2", "--prompts.images-per-prompt", "5"),
    *("--sampler.steps", "3", "--method.credit", "objective_only", "--run.save-every", "2"),
    *("--run.eval-prompts", "3", "--run.eval-steps", "2", "--run.device", "cpu"),
]
GROUPS = [
    *("--advantage.kind", "group", "--rewards", "scene", "1", "jpeg_incompressibility", "0.01"),
    *("--advantage.combine", "advantages", "--method.kl-weight", "0.1"),
    *("--method.selection", "random_fraction", "--trainable.ema-decay", "0.5"),
    *("--guard.every", "1", "--guard.prompts", "3", "--guard.images", "3"),
    *("--guard.reward", "brightness", "--guard.max-drift", "0.001", "--guard.patience", "3"),
]
PER_PROMPT = ["--advantage.kind", "per_prompt", "--advantage.min-count", "3"]
BATCH = [  # two images for three processes
    *("--advantage.kind", "batch", "--prompts.per-iteration", "2"),
    *("--prompts.images-per-prompt", "1", "--run.eval-prompts", "2"),
]


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def ended(process: Process, status: int = 0) -> tuple[str, str]:
    # within minutes, or it hangs
    try:
        said, erred = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise
    assert process.returncode == status, (said, erred)
    return said, erred


def torchrun(count: int, out: Path, *words: str, fault: str = "") -> Process:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone")
    fixture = FIXTURES / "processes_fixture.py"
    return started(*launcher, fixture, out, *words, env={"FAULT": fault})


def alone(root: Path, *options: str) -> dict[str, dict[str, torch.Tensor]]:
    """The same run in this process, with what it sampled."""
    with recorded(root.with_name(f"{root.name}_seen")):
        assert main(["train", *SMALL, "--out", str(root), *options]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return seen(root.with_name(f"{root.name}_seen"))


def seen(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.stem: load_file(file) for file in sorted(out.glob("*.safetensors"))}


def state_of(root: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint."""
    return load_file(sorted((root / "checkpoints").iterdir())[-1] / "state.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=atol, rtol=0, msg=name)


def assert_same_run(one: Path, other: Path, atol: float = 1e-6) -> None:
    """Weights, averages and moments; held-out images, rewards, and what was kept of both."""
    first = state_of(one)
    assert_same(first, state_of(other), atol)
    assert max(t.abs().max() for name, t in first.items() if "parameter" in name) > 0.01
    for file in (one / "samples" / "00000").iterdir():  # before training: the same bytes
        assert (other / "samples" / "00000" / file.name).read_bytes() == file.read_bytes()
    lines = zip(JobFolder(one).metrics(), JobFolder(other).metrics(), strict=True)
    for number, (a, b) in enumerate(lines):
        for name in [name for name in a if name.startswith(("reward", "held_out", "guard"))]:
            # after an update a pixel that is at the edge of rounding may fall to the other side
            assert a[name] == pytest.approx(
                b[name], abs=1e-3 if number or "guard" in name else 0
            ), name
        assert a["grad_norms"] == pytest.approx(b["grad_norms"], rel=1e-4)
        assert sum(a["log_ratio_histogram"]) == sum(b["log_ratio_histogram"])
    exports = [sorted(path.name for path in (root / "lora").iterdir()) for root in (one, other)]
    assert set(exports[0]) <= set(exports[1])  # a run that is stopped leaves one more
    assert JobFolder(other).state()["state"] == "done"


# --- one, two and three --------------------------------------------------------------------------


def test_two_processes_are_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["train", *SMALL, *PLAIN, *GROUPS]
    process = pcpo(*words, "--out", str(two), "--num-processes", "2")
    alone(one, *PLAIN, *GROUPS)
    said, erred = ended(process)
    assert said.count("held-out reward before training") == 1  # the first process alone speaks
    assert said.count("iteration 2/2") == 1 and not erred
    assert_same_run(one, two)
    exported = [load_file(root / "lora" / "pcpo_00002.safetensors") for root in (one, two)]
    for name, tensor in exported[0].items():
        torch.testing.assert_close(exported[1][name], tensor, atol=1e-6, rtol=0)


def test_two_processes_are_one_in_one_pass(tmp_path):
    """Five images a prompt: gradients of a group are spread over both."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*PLAIN, *GROUPS, "--method.update", "one_pass", "--optimizer.updates", "1"]
    process = pcpo("train", *SMALL, *options, "--out", str(two), "--num-processes", "2")
    assert main(["train", *SMALL, *options, "--out", str(one)]) == 0
    ended(process)
    assert_same_run(one, two)
    assert all(line["log_ratio_max"] == 0 for line in JobFolder(two).metrics())


@pytest.mark.parametrize("update", ["one_pass", "two_pass"])
def test_trees_of_images_are_whole_in_each_process(tmp_path, update):
    """Three of two images a prompt: nine trees, of which one process has five."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*PLAIN, *GROUPS, "--method.update", update, "--optimizer.updates", "1"]
    options += ["--prompts.per-iteration", "3", "--prompts.images-per-prompt", "6"]
    options += ["--sampler.branches", "2", "--sampler.branch-at", "1"]
    process = pcpo("train", *SMALL, *options, "--out", str(two), "--num-processes", "2")
    assert main(["train", *SMALL, *options, "--out", str(one)]) == 0
    ended(process)
    assert_same_run(one, two)


def test_equal_lines_are_one_group_in_two_processes(tmp_path):
    """Three prompts of two images, two of them equal: units of one process are no unit of two."""
    file, one, two = tmp_path / "prompts.txt", tmp_path / "one", tmp_path / "two"
    file.write_text("a red circle\na blue square\na red circle\n", encoding="utf-8")
    options = [*PLAIN, *GROUPS, "--method.update", "one_pass", "--optimizer.updates", "1"]
    options += ["--prompts.source", str(file), "--prompts.per-iteration", "3"]
    options += ["--prompts.images-per-prompt", "2"]
    process = pcpo("train", *SMALL, *options, "--out", str(two), "--num-processes", "2")
    assert main(["train", *SMALL, *options, "--out", str(one)]) == 0
    ended(process)
    assert_same_run(one, two)


def test_two_processes_score_with_one_head_that_new_votes_are_fitted_into(tmp_path, monkeypatch):
    options = [*PLAIN, "--run.iterations", "3", "--advantage.kind", "group", "--taste.ask-every"]
    options += ["1", "--taste.pairs", "2", "--rewards", "taste", "1", "--reward-options"]
    stores = [voted(tmp_path / name / "taste", votes=40)[0] for name in ("one", "two")]
    for store in stores:
        refit(store)
        still_open(store)
    one, two = (store.root.parent / "run" for store in stores)
    folders = [f"taste.folder={store.root}" for store in stores]
    monkeypatch.setenv("TASTE", str(stores[1].root))
    process = torchrun(
        2, tmp_path / "seen", "train", *SMALL, *options, folders[1], "--out", str(two)
    )
    monkeypatch.setenv("TASTE", str(stores[0].root))
    alone(one, *options, folders[0])
    ended(process)
    first, second = seen(tmp_path / "one" / "run_seen"), seen(tmp_path / "seen")
    assert first["0"]["rewards"].equal(second["0"]["rewards"])
    # a head tells a pixel that is rounded the other way: rewards differ by 1e-4 then
    assert_same(state_of(one), state_of(two), atol=1e-5)
    lines = [
        [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        for root in (one, two)
    ]
    heads = [[line["head_taste"] for line in run] for run in lines]
    assert heads[0] == heads[1] and heads[0][1] != heads[0][2]
    assert [line["votes_taste"] for line in lines[1]] == [40, 40, 52]
    for a, b in zip(*lines, strict=True):
        assert a["distance_taste"] == pytest.approx(b["distance_taste"], rel=1e-3)
    names = [sorted(file.name for file in (root / "taste").iterdir()) for root in (one, two)]
    assert names[0] == names[1] and len(names[0]) >= 3  # two heads, and which was used
    asked = [pair for pair in stores[1].asked() if "iteration" in pair.source]
    assert len(asked) == 4  # none while twelve wait, then two a time: not by each process


@pytest.mark.parametrize("update", ["one_pass", "two_pass"])
def test_two_processes_ask_one_server(tmp_path, update):
    """Each for its own images, while it samples the next: four images, then one."""
    one, two = tmp_path / "one", tmp_path / "two"
    with RewardServer("jpeg_incompressibility") as server:
        options = [*PLAIN, "--method.update", update, "--optimizer.updates", "1"]
        options += ["--advantage.kind", "group", "--rewards", "remote"]
        options += ["0.01", "--reward-options", f"remote.url={server.url}"]
        process = pcpo("train", *SMALL, *options, "--out", str(two), "--num-processes", "2")
        assert main(["train", *SMALL, *options, "--out", str(one)]) == 0
        ended(process)
    assert_same_run(one, two)


def test_three_processes_stopped_and_gone_on_with_as_two_are_one(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    longer = ["--run.iterations", "6"]
    words = ["train", *SMALL, *PLAIN, *PER_PROMPT, *longer]
    process = pcpo(*words, "--out", str(many), "--num-processes", "3")
    folder = JobFolder(many)
    until(folder.metrics, process)
    folder.ask("pause")
    until(lambda: folder.state()["state"] == "paused", process)
    folder.ask("continue")
    until(lambda: folder.state()["state"] == "running", process)
    process.send_signal(signal.SIGTERM)
    said, _ = ended(process)
    assert "stopped by a signal" in said and said.count("trainers resume") == 1
    assert JobFolder(many).state()["state"] == "stopped"
    process = pcpo("resume", str(many), "--num-processes", "2")
    alone(one, *PLAIN, *PER_PROMPT, *longer)
    said, _ = ended(process)
    assert "processes 3 (now 2)" in said
    assert_same_run(one, many, atol=2e-6)  # six iterations of rounding
    kept = [sorted((root / "checkpoints").iterdir())[-1] / "state.json" for root in (one, many)]
    remembered = [json.loads(file.read_text())["advantages"] for file in kept]
    assert [*remembered[0][0]] == [*remembered[1][0]]


def test_fewer_images_than_processes(tmp_path):
    out, root = tmp_path / "seen", tmp_path / "three"
    process = torchrun(3, out, "train", *SMALL, *PLAIN, *BATCH, "--out", str(root))
    one = alone(tmp_path / "one", *PLAIN, *BATCH)
    ended(process)
    three = seen(out)
    assert three.keys() == one.keys() == {"0", "1"}
    assert three["0"]["images"].equal(one["0"]["images"])  # bitwise: micro-batches are filled up
    assert three["0"]["rewards"].equal(one["0"]["rewards"])
    apart = (three["1"]["images"].int() - one["1"]["images"].int()).abs()
    assert apart.max() <= 1  # after an update
    assert_same_run(tmp_path / "one", root)


def until(found, process: Process) -> None:
    deadline = time.monotonic() + 300
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- full fine-tune ------------------------------------------------------------------------------

FLOW = """
rewards = { brightness = 1.0 }  # a pixel that is rounded the other way moves it by little
model = { source = "demo-flow" }
trainable = { kind = "full", ema_decay = 0.5 }
advantage = { kind = "group" }
optimizer = { lr = 0.3, eps = 1.0, weight_decay = 0.0, updates = 2 }
prompts = { per_iteration = 1, images_per_prompt = 5 }

[sampler]
steps = 3
drop_last = 1
transition = "flow_sde"
noise_level = 0.7
guidance_scale = 2.0
guidance_gradient = "conditional"

[method]
credit = "native"
clip_low = 1.0
clip_high = 1.0

[run]
iterations = 2
micro_batch = 2
save_every = 1
eval_prompts = 3
eval_steps = 2
device = "cpu"
"""
"""Five images for two processes in micro-batches of two, averages, and guidance whose other branch
has no gradient."""


def test_a_split_full_fine_tune_of_the_flow_model(tmp_path):
    config = tmp_path / "flow.toml"
    config.write_text(FLOW)
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "seen"
    process = torchrun(2, out, "train", str(config), "--out", str(two))
    with recorded(tmp_path / "alone"):
        assert main(["train", str(config), "--out", str(one)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    said, _ = ended(process)
    assert said.count("all weights are split over 2 processes") == 1
    whole = facts_of(tmp_path / "alone", 0)
    assert not any(whole["split"])
    for rank in (0, 1):
        found = facts_of(out, rank)
        assert len(found["split"]) == len(found["averages"]) == len(whole["split"])
        assert all(found["split"]) and all(found["averages"])
        assert found["bytes"] < 0.6 * whole["bytes"]  # half of the weights, and what is odd
    first, second = seen(tmp_path / "alone"), seen(out)
    assert first["0"]["images"].equal(second["0"]["images"])
    assert first["0"]["rewards"].equal(second["0"]["rewards"])
    assert_same(state_of(one), state_of(two), atol=1e-5)
    moved = [
        (state_of(one)[f"average.{i}"] - state_of(one)[f"parameter.{i}"]).abs().max()
        for i in range(len(whole["split"]))
    ]
    assert max(moved) > 1e-3
    exports = [load_file(root / "lora" / "pcpo_00002.safetensors") for root in (one, two)]
    assert_same(*exports, atol=1e-3)  # float16
    for root in (two, one):  # what two wrote, one goes on with
        assert main(["resume", str(root), "--iterations", "3"]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    assert_same(state_of(one), state_of(two), atol=1e-5)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"model": {"precision": "float16"}}, "'float16', whose scaled gradients"),
        ({"optimizer": {"kind": "adamw8bit"}}, "'adamw8bit', whose moments"),
    ],
)
def test_what_cannot_be_split_is_refused(section, said):
    config = TrainConfig.model_validate({"trainable": {"kind": "full"}, **section})
    with pytest.raises(ConfigError, match=said):
        check_split(config)


def facts_of(out: Path, rank: int) -> dict:
    return json.loads((out / f"facts{rank}.json").read_text())


# --- one end -------------------------------------------------------------------------------------


def test_a_killed_process_ends_the_run_which_can_be_resumed(tmp_path):
    one, root = tmp_path / "one", tmp_path / "killed"
    longer = [*("--run.iterations", "4"), *PER_PROMPT]
    process = pcpo("train", *SMALL, *PLAIN, *longer, "--out", str(root), "--num-processes", "2")
    until(lambda: JobFolder(root).metrics(), process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    other = next(rank for rank in ranks if rank.pid != JobFolder(root).read("status.json")["pid"])
    other.kill()
    _, erred = ended(process, status=2)
    assert "another process of the run has ended" in erred and erred.count("\n") == 1, erred
    assert JobFolder(root).state()["state"] == "failed"
    assert not any(rank.is_running() for rank in ranks) and not JobFolder(root).is_held()
    assert main(["resume", str(root)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    alone(one, *PLAIN, *longer)
    assert_same_run(one, root, atol=2e-6)


@pytest.mark.slow
def test_the_first_process_killed_is_said_by_what_started_it(tmp_path):
    root = tmp_path / "killed"
    process = pcpo("train", *SMALL, *PLAIN, "--out", str(root), "--num-processes", "2")
    until(lambda: JobFolder(root).metrics(), process)
    os.kill(JobFolder(root).read("status.json")["pid"], signal.SIGKILL)
    _, erred = ended(process, status=2)
    assert "process 0 of 2 was killed by signal 9; go on with `" in erred
    assert "was killed by signal 9" in JobFolder(root).state()["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "options", "status", "said"),
    [
        ("nan 1", SMALL, "failed", "in process 1: the reward 'scene' failed: it is not a number"),
        ("bug 1", SMALL, "failed", "in process 1: KeyError: 'weights'"),
        ("interrupt 1", SMALL, "stopped", "stopped by a signal"),
        ("pass 1", None, "failed", "another process of the run has ended"),  # of a split network
    ],
)
def test_what_one_process_meets_ends_all(tmp_path, fault, options, status, said):
    root, config = tmp_path / "run", tmp_path / "flow.toml"
    config.write_text(FLOW)
    words = [*(options or [str(config)]), "--run.iterations", "4", "--out", str(root)]
    process = torchrun(2, tmp_path / "seen", "train", *words, fault=fault)
    out, erred = ended(process, status=0 if status == "stopped" else 1)
    state = JobFolder(root).state()
    assert state["state"] == status and said in state["message"]
    assert (out + erred).count(said) == 1, erred
    if fault == "bug 1":
        assert 'KeyError("weights")' in erred  # its traceback, once
    if fault == "pass 1":
        assert "the network does not fit" in erred
    assert main(["resume", str(root)]) == 0
    assert JobFolder(root).metrics()[-1]["iteration"] == 4


def test_they_agree_on_results_and_errors():
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    said, _ = ended(started(*launcher, FIXTURES / "together_fixture.py"))
    assert sorted(said.split("\n")) == ["", "process 0 agrees", "process 1 agrees"]


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--num-processes"], ["--num-processes", "0"], ["--num-processes=x"]]
)
def test_a_number_of_processes_is_refused(words, capsys):
    assert main(["train", *SMALL, *words]) == 2
    said = capsys.readouterr().err
    said_of = r"--num-processes(: expected one| is '0': .* than or equal to 1| is 'x': )"
    assert re.search(said_of, said)


def test_processes_of_two_launchers_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="torchrun or accelerate has started"):
        processes(2)


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(3, "cpu")
    check_devices(2, "auto")
    with pytest.raises(ConfigError, match="is 3, but there are 2 CUDA devices"):
        check_devices(3, "auto")

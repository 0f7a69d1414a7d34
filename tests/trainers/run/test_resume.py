"""A run that is killed at any moment goes on to the same bytes, and says so where it cannot."""

from __future__ import annotations

import errno
import json
import random
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.pcpo.rewards import Scores
from comfyui_pcpo.pcpo.rewards.scene import SceneReward
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.sections import PromptConfig
from comfyui_pcpo.trainers.config.train_config import TrainConfig, validate
from comfyui_pcpo.trainers.job import files, inputs
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.job.prompts import PromptSplit, split_prompts
from comfyui_pcpo.trainers.run import checkpoint, loop
from warm_fixture import pcpo

SMALL = [
    *("--run.iterations", "6", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "3", "--method.selection", "all", "--run.micro-batch", "4"),
    *("--run.save-every", "3", "--run.eval-prompts", "2", "--run.eval-steps", "2"),
    *("--advantage.kind", "per_prompt", "--advantage.min-count", "3"),
]
FLOW = [  # the window, where images part, moves at every iteration; KL and averages are on
    *("--model.source", "demo-flow", "--sampler.transition", "flow_sde"),
    *("--sampler.noise-level", "0.7", "--sampler.steps", "4", "--sampler.drop-last", "1"),
    *("--method.selection", "sliding_window", "--method.window", "2", "--method.window-every", "1"),
    *("--method.kl-weight", "0.1", "--method.kl-fraction", "0.5", "--trainable.ema-decay", "0.9"),
    *("--trainable.targets", "attn.to_q", "attn.to_v", "--rewards", "jpeg_incompressibility", "1"),
    *("--sampler.branches", "2"),
]
ONE_PASS = [  # group by group; KL and averages are on; images part after the first step
    *("--sampler.branches", "2", "--sampler.branch-at", "1"),
    *("--method.update", "one_pass", "--advantage.kind", "group", "--run.micro-batch", "2"),
    *("--method.kl-weight", "0.1", "--method.kl-fraction", "0.5", "--trainable.ema-decay", "0.9"),
]
FULL = ["--trainable.kind", "full", "--trainable.ema-decay", "0.9", "--optimizer.lr", "1e-4"]


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def start(root: Path, *options: str) -> list[str]:
    return ["train", "--preset", "demo", "--out", str(root), *SMALL, *options]


def exports(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (root / "lora").glob("*.safetensors")}


def last_checkpoint(root: Path) -> bytes:
    """Parameters, averages and moments."""
    return (root / "checkpoints" / "00006" / "state.safetensors").read_bytes()


def without_times(root: Path) -> list[dict]:
    timed = ("seconds", "seconds_rollout", "seconds_update", "images_per_second")
    lines = JobFolder(root).metrics()
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def killed_after(words: list[str], root: Path, lines: int, delay: float) -> None:
    """Start, wait for some lines of metrics and a moment more, then kill -9."""
    process = pcpo(*words)
    deadline = time.monotonic() + 120
    while len(JobFolder(root).metrics()) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("options", "kills"),
    [([], 3), (FULL, 1), (FLOW, 2), (ONE_PASS, 1)],
    ids=["lora", "full with ema", "flow", "one pass"],
)
def test_killed_runs_end_with_the_same_bytes(tmp_path, options, kills):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main(start(straight, *options)) == 0
    moments = random.Random(7)
    for kill in range(kills):
        words = ["resume", str(broken)] if kill else start(broken, *options)
        killed_after(words, broken, lines=1 + 4 * kill // 3, delay=moments.uniform(0, 0.4))
        assert JobFolder(broken).state()["state"] in ("lost", "done")
    assert main(["resume", str(broken)]) == 0
    assert exports(broken) == exports(straight)
    assert without_times(broken) == without_times(straight)
    assert last_checkpoint(broken) == last_checkpoint(straight)
    if options is FLOW:
        assert JobFolder(broken).metrics()[-1]["kl"] > 0
    assert JobFolder(broken).state()["state"] == "done"


@pytest.mark.slow
def test_ten_kills_of_a_demo_run(tmp_path):
    """The shipped preset, killed at ten random moments: takes about ten minutes."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    demo = ("train", "--preset", "demo", "--out")
    assert main([*demo, str(straight)]) == 0
    moments = random.Random(11)
    for kill in range(10):
        words = ["resume", str(broken)] if kill else [*demo, str(broken)]
        lines = len(JobFolder(broken).metrics()) + (kill % 2 if kill else 1)
        killed_after(words, broken, lines=lines, delay=moments.uniform(0, 20))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["resume", str(broken)]) == 0
    assert exports(broken) == exports(straight)
    assert without_times(broken) == without_times(straight)


@pytest.mark.slow
def test_two_hundred_iterations_keep_their_memory(tmp_path):
    """Resident memory is flat once caches are warm (to 3%); nothing is left open."""
    root = tmp_path / "run"
    options = ("--run.iterations", "200", "--run.save-every", "20")
    process = pcpo(*start(root, *options))
    seen: dict[int, tuple[int, int]] = {}
    while process.poll() is None:
        found = process_state(process.pid)
        if found is not None:
            seen[len(JobFolder(root).metrics())] = found
        time.sleep(0.1)
    assert process.returncode == 0
    assert [line["iteration"] for line in JobFolder(root).metrics()] == list(range(1, 201))
    late = {lines: found for lines, found in seen.items() if 80 <= lines < 200}
    memory, files = zip(*(late[lines] for lines in sorted(late)), strict=True)
    print(
        f"resident: {memory[0]} kB at 80, at most {max(memory)} kB after; open files: {set(files)}"
    )
    assert max(memory) < 1.03 * memory[0]
    assert max(files) <= files[0] + 2
    assert not list(root.rglob("*.tmp"))
    assert not JobFolder(root).is_held()


def process_state(pid: int) -> tuple[int, int] | None:
    """Resident memory in kB and open files of a process; None once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(resident.split()[1]), len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (OSError, StopIteration):
        return None


# --- in one process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Three iterations of six, with their checkpoints."""
    root = tmp_path_factory.mktemp("finished") / "run"
    assert main(start(root, "--run.iterations", "3")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return root


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(capsys, *words: str) -> str:
    """What a command says when it ends with 2; always one line."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("pcpo ") and "\n" not in said, said
    return said


def test_last_checkpoints_and_the_best_are_kept(run):
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[-2:] == ["00002", "00003"]
    state = json.loads((run / "checkpoints" / "00003" / "state.json").read_text())
    assert state["best"][1] == 3 and state["iteration"] == 3
    assert sum(map(len, state["advantages"][0].values())) == 12  # images it has seen


def test_pruning_spares_the_best(tmp_path):
    folder = JobFolder(tmp_path)
    for i in range(1, 7):
        (folder.checkpoints / f"{i:05}").mkdir(parents=True)
    (folder.checkpoints / ".00007.1.tmp").mkdir()
    checkpoint._prune(folder, 2, checkpoint.Position(6, best=(0.5, 3)))
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["00003", "00005", "00006"]


def test_the_newest_of_many_iterations_is_found_and_kept(tmp_path):
    folder = JobFolder(tmp_path)
    for iteration in (99_998, 99_999, 100_000):
        (folder.checkpoints / f"{iteration:05}").mkdir(parents=True)
    assert [int(path.name) for path in checkpoint._kept_iterations(folder)] == [
        100_000,
        99_999,
        99_998,
    ]
    checkpoint._prune(folder, 2, checkpoint.Position(100_000))
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["100000", "99999"]


def test_a_longer_run_is_the_same_as_one_that_was_long_from_the_start(run, tmp_path):
    assert main(["resume", str(run), "--iterations", "6"]) == 0
    assert main(start(tmp_path / "long")) == 0
    last = "pcpo_00006.safetensors"
    assert exports(run)[last] == exports(tmp_path / "long")[last]
    assert JobFolder(run).job()["config"]["run"]["iterations"] == 6


def test_damaged_checkpoint_is_passed_over(run, capsys):
    before = exports(run)
    for export in (run / "lora").iterdir():
        export.unlink()
    tensors = run / "checkpoints" / "00003" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert main(["resume", str(run)]) == 0
    assert "00003 is damaged" in capsys.readouterr().out
    assert exports(run) == before


def damaged(run: Path, changes: dict[str, object], *, is_old: bool = False) -> list[str]:
    """What is said of a newest checkpoint whose state.json was changed; the one before is taken."""
    for path in (run / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        if is_old:
            del state["seal"]
        if path.name == "00003":
            state = {k: v for k, v in (state | changes).items() if v is not ...}
        (path / "state.json").write_text(json.dumps(state))
    config = validate(JobFolder(run).job()["config"], "job.json")
    found, notes = checkpoint.newest(JobFolder(run), config)
    assert found is not None and found.name == "00002", notes
    return notes


PLACE = ("iteration", "before", "best", "strikes", "advantages", "rewards", "scaler", "checksum")


@pytest.mark.parametrize("name", [*PLACE, "config", "machine"])
@pytest.mark.parametrize("value", [..., "text", [3.5], {"a": 1}])
def test_a_checkpoint_whose_state_was_edited_is_passed_over(run, name, value):
    if name == "machine" and value == {"a": 1}:
        pytest.skip("it is compared and said, no more")
    (note,) = damaged(run, {name: value})
    assert "00003 is damaged (" in note


@pytest.mark.parametrize(
    "changes",
    [
        *({"iteration": 2}, {"before": 0.5}, {"best": [0.5, 2]}, {"strikes": 1}),
        *({"advantages": [None]}, {"rewards": {}}),
    ],
)
def test_a_number_that_was_edited_is_seen(run, changes):
    said = damaged(run, changes)[0]
    assert "state.json is not what was written" in said or "is of iteration 2" in said


@pytest.mark.parametrize("changes", [{"iteration": 2}, {"iteration": ...}, {"best": 3}])
def test_checkpoints_of_before_are_read_with_care(run, changes):
    assert "00003 is damaged (" in damaged(run, changes, is_old=True)[0]


def test_checkpoints_of_before_go_on_to_the_same_bytes(run):
    before = exports(run)
    for path in (run / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        del state["seal"]
        (path / "state.json").write_text(json.dumps(state))
    shutil.rmtree(run / "checkpoints" / "00003")
    shutil.rmtree(run / "lora")
    assert main(["resume", str(run)]) == 0
    assert exports(run) == before


def test_a_checkpoint_of_another_shape_is_one_sentence(run, capsys):
    for path in (run / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        del state["seal"]
        (path / "state.json").write_text(json.dumps(state | {"advantages": [{"odd": 1}]}))
    assert "does not fit" in refused(capsys, "resume", str(run))


def own_prompts(tmp_path: Path, *options: str) -> tuple[Path, Path]:
    """Two iterations on a prompt file of six, one of which is held out; the run and the file."""
    file, root = tmp_path / "prompts.txt", tmp_path / "own"
    file.write_text("".join(f"a picture of {name}\n" for name in "abcdef"))
    words = start(root, "--run.iterations", "2", "--prompts.source", str(file))
    assert main([*words, "--rewards", "brightness", "1", *options]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return root, file


def test_a_run_keeps_its_prompts(tmp_path, capsys):
    root, file = own_prompts(tmp_path)
    assert "held out of training: 1 of 6 prompts, 'a picture of d'" in capsys.readouterr().out
    kept = json.loads((root / "training_prompts.json").read_text())
    assert kept["held_out"] == ["a picture of d"] and len(kept["prompts"]) == 5
    other = Path(shutil.copytree(root, tmp_path / "other"))
    assert main(["resume", str(root), "--iterations", "3"]) == 0
    assert "others than" not in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)) + "one more\n")
    assert main(["resume", str(other), "--iterations", "3"]) == 0
    said = capsys.readouterr().out
    assert "are others than at the start; the run goes on with the prompts it began with" in said
    assert exports(other) == exports(root)
    AcceleratorState._reset_state(reset_partial_state=True)
    file.unlink()
    assert main(["resume", str(other), "--iterations", "4"]) == 0
    assert "neither a file nor a built-in set" in capsys.readouterr().out
    (other / "training_prompts.json").write_text(json.dumps(kept | {"held_out": ["another"]}))
    assert "training_prompts.json is not what" in refused(capsys, "resume", str(other))


def test_a_run_of_before_keeps_its_prompts_from_here_on(tmp_path, capsys):
    """As the version before wrote it: no field, no list, no fingerprints."""
    root, _ = own_prompts(tmp_path, "--prompts.held-out", "training")
    assert "trained on, too" in capsys.readouterr().out
    assert main(["resume", str(root), "--iterations", "3"]) == 0
    after, last = exports(root), "pcpo_00003.safetensors"
    AcceleratorState._reset_state(reset_partial_state=True)
    (root / "training_prompts.json").unlink()
    shutil.rmtree(root / "checkpoints" / "00003")
    states = sorted((root / "checkpoints").glob("*/state.json"))
    for json_file in (root / "job.json", *states):
        found = json.loads(json_file.read_text())
        del found["config"]["prompts"]["held_out"]
        found.pop("seal", None)
        for name in ("prompts", "files"):
            found.get("inputs", {}).pop(name, None)
        json_file.write_text(json.dumps(found))
    (root / "lora" / last).unlink()
    assert main(["resume", str(root)]) == 0
    assert exports(root)[last] == after[last]
    kept = json.loads((root / "training_prompts.json").read_text())
    assert kept["held_out"] == kept["prompts"][:2] and len(kept["prompts"]) == 6


def test_files_that_are_not_kept_are_compared(tmp_path, capsys):
    vae = tmp_path / "part.safetensors"
    vae.write_bytes(b"one")
    config = TrainConfig.model_validate(
        {"model": {"vae": str(vae)}, "trainable": {"init_lora": str(vae)}}
    )
    split = PromptSplit(("a",), ("b",))
    remembered: dict = {}
    assert not inputs.check_inputs(remembered, config, scenes(), tmp_path)
    assert set(remembered["files"]) == {"model.vae", "trainable.init_lora"}
    vae.write_bytes(b"two")
    with pytest.raises(JobError, match=r"trainable\.init_lora is not the file that"):
        inputs.check_inputs(remembered, config, split, tmp_path)


def scenes() -> PromptSplit:
    return split_prompts(PromptConfig(), 16)


def test_no_whole_checkpoint_is_refused(run, capsys):
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    assert "is damaged" in refused(capsys, "resume", str(run))


@pytest.mark.parametrize(
    ("section", "field", "value"), [("optimizer", "lr", 0.5), ("method", "objective", "hinge")]
)
def test_checkpoint_of_another_config_is_refused(run, capsys, section, field, value):
    job = json.loads((run / "job.json").read_text())
    job["config"][section][field] = value
    (run / "job.json").write_text(json.dumps(job))
    said = refused(capsys, "resume", str(run))
    assert f"{section}.{field} was" in said and f"is {value!r}" in said


def test_a_run_of_a_version_with_fewer_settings_goes_on(run, capsys):
    state = sorted((run / "checkpoints").iterdir())[-1] / "state.json"
    for file in (run / "job.json", state):
        found = json.loads(file.read_text())
        del found["config"]["guard"], found["config"]["method"]["update"]
        file.write_text(json.dumps(found))
    assert main(["resume", str(run)]) == 0
    assert "going on after iteration" in capsys.readouterr().out


def test_another_model_is_refused(run, capsys):
    job = json.loads((run / "job.json").read_text())
    job["inputs"]["model"] = "0" * 64
    (run / "job.json").write_text(json.dumps(job))
    assert "is not the one" in refused(capsys, "resume", str(run))


def test_folders_that_cannot_be_resumed_are_refused(run, tmp_path, capsys):
    assert "no run" in refused(capsys, "resume", str(tmp_path / "nowhere"))
    with JobFolder(run).hold():
        assert "in use by process" in refused(capsys, "resume", str(run))


def test_another_number_of_threads_is_said(run, capsys):
    state = run / "checkpoints" / "00003" / "state.json"
    changed = json.loads(state.read_text())
    changed["machine"]["threads"] = 64
    state.write_text(json.dumps(changed))
    assert main(["resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert "threads 64 (now" in said and "not promised" in said


# --- faults while it runs ------------------------------------------------------------------------


def fails_at(monkeypatch, module, name, call, fault):
    """Make the n-th call of a function do something else first."""
    real, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            fault()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


def resumable(run: Path) -> None:
    """The checkpoints are whole: the run goes on to its end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not list((run / "checkpoints").glob(".*"))
    assert main(["resume", str(run), "--iterations", "6"]) == 0
    assert JobFolder(run).metrics()[-1]["iteration"] == 6


def raise_(error: BaseException):
    def fault():
        raise error

    return fault


class Nan:
    """Scores that are no numbers."""

    def __call__(self, images: torch.Tensor) -> Scores:
        return Scores(torch.full((len(images),), float("nan")), ({},), (None,))


@pytest.mark.parametrize(
    ("broken", "said"),
    [(lambda images: {}["weights"], "KeyError: 'weights'"), (Nan(), "it is not a number")],
    ids=["raises", "nan"],
)
def test_failing_reward(run, capsys, monkeypatch, broken, said):
    real = SceneReward.score

    def score(self, images, prompts):
        return broken(images) if len(images) == 4 else real(self, images, prompts)

    monkeypatch.setattr(SceneReward, "score", score)
    text = refused(capsys, "resume", str(run), "--iterations", "6")
    assert f"the reward 'scene' failed: {said}" in text
    assert JobFolder(run).state()["state"] == "failed"
    monkeypatch.undo()
    resumable(run)


def test_disk_full_in_a_checkpoint(run, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    fails_at(monkeypatch, checkpoint, "save_file", 2, raise_(full))
    said = refused(capsys, "resume", str(run), "--iterations", "6")
    assert "checkpoint of iteration 5" in said and "No space left" in said
    monkeypatch.undo()
    resumable(run)


def test_no_room_for_a_checkpoint(run, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = usage(10**9, 10**9, 30_000_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: free)
    said = refused(capsys, "resume", str(run), "--iterations", "6")
    assert "and 34 MB in reserve, but" in said and "has 30 MB free" in said
    monkeypatch.undo()
    resumable(run)


def test_job_folder_deleted(run, capsys, monkeypatch):
    fails_at(monkeypatch, loop, "update", 2, lambda: shutil.rmtree(run))
    assert "was deleted" in refused(capsys, "resume", str(run), "--iterations", "6")
    assert not run.exists()


def test_config_edited(run, capsys, monkeypatch):
    kept = (run / "job.json").read_text()

    def edit():
        (run / "job.json").write_text(kept.replace('"seed": 0', '"seed": 1'))

    fails_at(monkeypatch, loop, "update", 2, edit)
    assert "was edited" in refused(capsys, "resume", str(run), "--iterations", "6")
    job = json.loads(kept)
    job["config"]["run"]["iterations"] = 6
    files.write_json(run / "job.json", job)
    monkeypatch.undo()
    resumable(run)


def test_stopped_between_checkpoints_loses_nothing(tmp_path, capsys, monkeypatch):
    root = tmp_path / "run"
    fails_at(monkeypatch, loop, "update", 2, lambda: JobFolder(root).ask("stop"))
    assert main([*start(root), "--run.checkpoint-every", "100", "--run.save-every", "100"]) == 0
    assert f"trainers resume {root}`" in capsys.readouterr().out
    assert JobFolder(root).state()["state"] == "stopped"
    assert [path.name for path in (root / "checkpoints").iterdir()] == ["00002"]


def test_tensorboard_events(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    root = tmp_path / "run"
    assert main([*start(root), "--run.iterations", "2", "--run.tensorboard"]) == 0
    found = events.EventAccumulator(str(root / "tensorboard"))
    found.Reload()
    rewards = [line["reward"] for line in JobFolder(root).metrics()]
    read = torch.tensor([event.value for event in found.Scalars("reward")])
    torch.testing.assert_close(read, torch.tensor(rewards))

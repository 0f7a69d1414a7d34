"""One job folder with odd contents beside good ones: it is shown as that, and all else works."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_api_fixture  # before any module of nodes/
import pytest
from comfyui_pcpo.nodes.jobs import routes
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.nodes.training import jobs as training_jobs
from comfyui_pcpo.nodes.training import pick as training_pick
from comfyui_pcpo.trainers.cli import jobs as command
from comfyui_pcpo.trainers.cli import preference
from comfyui_pcpo.trainers.compare import folder as compare_folder
from comfyui_pcpo.trainers.compare import paper
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.errors import Stopped, UserError
from comfyui_pcpo.trainers.evaluate import command as evaluation
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.report.page import write_page
from comfyui_pcpo.trainers.run.control import Control
from comfyui_pcpo.trainers.run.publish import publish

ODD_ID, GOOD_ID = "0" * 16, "1" * 16
SCORES = "samples/00000/scores.json"
JSON_FILES = {
    "job.json": {
        "config": TrainConfig().model_dump(mode="json"),
        "name": "odd",
        "created": 5.0,
        "device": "cpu",
        "settings": {},
        "inputs": {"base": "sd1"},
        "versions": {},
    },
    "status.json": {"state": "done", "iteration": 2, "of": 2, "heartbeat": 1.0, "pid": 1},
    "control.json": {"request": "pause"},
    "published.json": {"file": "x", "checksums": [None, 1]},
    "guard/guard.json": {
        "rule": "a rule",
        "said": None,
        "ended": False,
        "best": 2,
        "values": {"guard_reward": {"name": "reward", "start": 0.1, "bound": None}},
    },
    SCORES: [{"prompt": "a", "reward": 0.5}],
    "metrics.jsonl": {"iteration": 2, "reward": 0.5, "held_out": 0.5, "grad_norms": [1.0]},
}
OTHERS = ("worker.log", "stderr.log", "job.lock", "lora", "samples", "samples/00000", "guard")


def deep(value: Any) -> list[Any]:
    for _ in range(900):
        value = [value]
    return value


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"config": {"run"',
    "null": b"null",
    "number": b"7",
    "text": b'"text"',
    "list": b"[1, null, {}]",
    "object": b'{"prompt": "x"}',
    "list of objects": b'[{"prompt": "x"}]',
    "zeros": b"\x00" * 64,
    "no utf-8": b'{"state": "\xff\xfe"}\n\xff\xfe\xff',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"state": ' + b"9" * 5000 + b"}",
    "null config": b'{"config": null}',
    "null state": b'{"state": null}',
    "lists": b'{"state": [], "request": [], "checksums": 3, "best": [], "config": [], "name": {}}',
    "unknown state": b'{"state": "dancing", "request": "dance"}',
}
PLACES = {
    "folder": lambda file: file.mkdir(),
    "pipe": lambda file: os.mkfifo(file),
    "loop": lambda file: file.symlink_to(file),
    "device": lambda file: file.symlink_to("/dev/zero"),
}
VALUES: tuple[Any, ...] = (
    None,
    -1,
    10**400,
    1e300,
    "text",
    "\ud800",
    float("nan"),
    [],
    {},
    deep(1),
)


def write(root: Path, name: str = "odd") -> None:
    """A good job's folder."""
    for file, value in JSON_FILES.items():
        value = {**value, "name": name} if file == "job.json" else value
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(value) + "\n", encoding="utf-8")
    (root / "control.json").unlink()  # of a good one
    (root / "samples/00000/000.png").write_bytes(b"png")
    (root / "worker.log").write_text("said\n")
    (root / "lora").mkdir(exist_ok=True)
    (root / "lora/pcpo_00002.safetensors").write_bytes(b"x")


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A registry of an odd job and a good one, whose workers cannot be started."""

    def launch(root: Path, *, device: str) -> Any:
        raise OSError(1, "nothing is started here")

    made = JobRegistry(tmp_path / "jobs", launch, notify=lambda jobs: json.dumps(jobs))
    monkeypatch.setattr(made, "wake", lambda: None)
    for module in (routes, training_jobs, training_pick):
        monkeypatch.setattr(module, "registry", lambda: made)
    write(made.root / ODD_ID)
    write(made.root / GOOD_ID, "good")
    return made


def replaced(file: Path, make: Callable[[Path], Any]) -> None:
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    make(file)


def everything_works(jobs: JobRegistry, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """All readers of a job folder, with the odd one among them; its summary."""
    there = {job["id"]: job for job in jobs.jobs()}
    assert set(there) == {ODD_ID, GOOD_ID}
    json.dumps(list(there.values()), allow_nan=False)
    assert (there[GOOD_ID]["name"], there[GOOD_ID]["state"]) == ("good", "done")
    status, detail = routes.look(jobs, ODD_ID)
    assert status == 200
    json.dumps(detail, allow_nan=False).encode()
    assert isinstance(detail["config"], dict | None)
    for node in (n for n in training_jobs.NODES if issubclass(n, training_jobs.OfAJob)):
        options = comfy_api_fixture.schema_of(node).inputs
        names = next(one.options for one in options if one.id == "job")
        assert "good" in names and len(names) == 3
        json.dumps(names)
    training_pick.sign_of(jobs, None)
    for id in (ODD_ID, GOOD_ID):
        try:
            training_pick.export_of(jobs.folder(id), "best", 0)
        except Exception as error:
            assert id == ODD_ID and "no LoRA" in str(error)
    with jobs._lock:
        jobs._start_next(jobs.jobs())
    jobs.free_name(jobs.root, "another")
    assert command.main(["list", str(jobs.root)]) == 0
    told = capsys.readouterr().out
    assert f"{GOOD_ID}" in told and f"{ODD_ID}" in told and len(told.splitlines()) == 2
    try:
        command.main(["show", str(jobs.root / ODD_ID)])
    except UserError as error:
        assert "job.json" in str(error)
    capsys.readouterr()
    return there[ODD_ID]


def a_worker_lives(root: Path) -> None:
    """What a run reads of its folder while it works."""
    folder = JobFolder(root)
    folder.state(), folder.place(), folder.guard_record(), folder.request()
    try:
        folder.metrics(), folder.cut_metrics(1)
    except OSError:
        assert not (root / "metrics.jsonl").is_file()
    if (root / "report").parent.is_dir():
        write_page(folder)


@pytest.mark.parametrize("name", [*JSON_FILES])
@pytest.mark.parametrize("text", [*TEXTS])
def test_a_file_that_holds_something_else(jobs, capsys, name, text):
    root = jobs.root / ODD_ID
    replaced(root / name, lambda file: file.write_bytes(TEXTS[text]))
    now = everything_works(jobs, capsys)
    if name in ("job.json", "status.json") and text != "object":
        assert now["state"] == "unreadable" and f"{name} cannot be read: " in now["message"]
    a_worker_lives(root)
    jobs.delete(ODD_ID)
    assert [job["name"] for job in jobs.jobs()] == ["good"] and not root.exists()


@pytest.mark.skipif(os.name == "nt", reason="made of POSIX files")
@pytest.mark.parametrize("name", [*JSON_FILES, *OTHERS])
@pytest.mark.parametrize("place", [*PLACES])
def test_a_file_that_is_something_else(jobs, capsys, name, place):
    root = jobs.root / ODD_ID
    replaced(root / name, PLACES[place])
    now = everything_works(jobs, capsys)
    if name in ("job.json", "status.json") and place != "loop":
        assert now["state"] == "unreadable"
    a_worker_lives(root)
    jobs.delete(ODD_ID)
    assert [job["name"] for job in jobs.jobs()] == ["good"]


@pytest.mark.parametrize("name", [*JSON_FILES])
def test_a_field_that_is_something_else(jobs, capsys, name):
    def fields(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        found = [path]
        for key, part in inner if isinstance(value, dict | list) else ():
            found += fields(part, (*path, key)) if isinstance(part, dict | list) else [(*path, key)]
        return found

    root, good = jobs.root / ODD_ID, JSON_FILES[name]
    few = ("source", "credit", "scene", "iterations", "publish")
    places = [p for p in fields(good) if p and (len(p) < 3 or p[-1] in few or name != "job.json")]
    for place in places:
        for value in VALUES:
            changed = json.loads(json.dumps(good))
            parent = changed
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = value
            text = json.dumps(changed)
            replaced(root / name, lambda file, text=text: file.write_text(text))
            try:
                everything_works(jobs, capsys)
                if name != "job.json":
                    a_worker_lives(root)
            except Exception as error:
                error.add_note(f"{name} with {place} = {str(value)[:60]}")
                raise
            if name != "metrics.jsonl":  # the summary follows a file that only grows
                continue
            jobs._known.clear()


def test_every_reader_is_told_why(tmp_path):
    write(tmp_path)
    folder = JobFolder(tmp_path)
    (tmp_path / "job.json").write_bytes(b'{"config": null}')
    with pytest.raises(JobError, match=r"job\.json cannot be read: config is None"):
        folder.job()
    assert folder.state()["state"] == "unreadable"


def test_an_unreadable_job_is_not_started_and_can_go_on_when_it_is_mended(jobs):
    root = jobs.root / ODD_ID
    (root / "status.json").write_text('{"state": null}')
    assert jobs.summary(ODD_ID)["state"] == "unreadable"
    jobs.resume(ODD_ID)  # its job.json is whole, and that is all that a worker needs
    assert jobs.summary(ODD_ID)["state"] == "queued"
    (root / "job.json").write_text("{}")
    (root / "status.json").write_text('{"state": null}')
    with pytest.raises(JobError, match=r"job\.json cannot be read"):
        jobs.resume(ODD_ID)


def test_one_job_that_cannot_be_started_does_not_stop_the_queue(jobs, monkeypatch, tmp_path):
    started = []

    def launch(root: Path, *, device: str) -> Any:
        started.append(root.name)
        raise OSError(1, "nothing is started here")

    status = JobFolder.status

    def full(folder: JobFolder, state: str, **fields: Any) -> None:
        if folder.root.name == ODD_ID:
            raise OSError(28, "No space left on device")
        status(folder, state, **fields)

    for id in (ODD_ID, GOOD_ID):
        JobFolder(jobs.root / id).status("queued")
    jobs._launch = launch
    monkeypatch.setattr(JobFolder, "status", full)
    jobs._start_next(jobs.jobs())
    assert started == [GOOD_ID]


def test_a_run_goes_on_whatever_is_asked_of_it(tmp_path):
    write(tmp_path)
    folder = JobFolder(tmp_path)
    control = Control(folder)
    for text in TEXTS.values():
        (tmp_path / "control.json").write_bytes(text)
        assert control.between(1, 2) is False
    folder.lora.mkdir(exist_ok=True)
    for text in TEXTS.values():
        (tmp_path / "published.json").write_bytes(text)
        target = tmp_path / "mine.safetensors"
        target.write_bytes(b"of another origin")
        assert "not of this run" in str(publish(folder, folder.last_export(), target))
    (tmp_path / "control.json").write_text('{"request": "stop"}')
    with pytest.raises(Stopped):
        control.between(1, 2)


def test_what_a_user_puts_among_the_exports_is_left_alone(jobs):
    folder = JobFolder(jobs.root / GOOD_ID)
    (folder.lora / "pcpo_best.safetensors").write_bytes(b"")
    (folder.lora / "pcpo_00009.safetensors").mkdir()
    assert [file.name for file in folder.exports().values()] == ["pcpo_00002.safetensors"]
    assert training_pick.export_of(folder, "latest", 0).name == "pcpo_00002.safetensors"


def test_what_is_no_run_is_never_deleted(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "job.json").write_text('{"build": 7}')  # of another program
    with pytest.raises(JobError, match="no run"):
        JobFolder(other).delete()
    write(tmp_path / "mine")
    (tmp_path / "mine" / "job.json").write_bytes(b"\xff")
    JobFolder(tmp_path / "mine").delete()
    assert not (tmp_path / "mine").exists()


# --- comparisons, evaluations and pages ----------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, "half"])
@pytest.mark.parametrize("name", ["compare.json", "evaluation.json", "result.json", "key.json"])
def test_a_folder_of_another_command_that_cannot_be_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(TEXTS.get(text, b'{"config": {}, "settings": 3, "sides": [1]}'))
    with pytest.raises(ConfigError):
        compare_folder.read_setup(tmp_path)
    with pytest.raises(ConfigError):
        preference.main(["count", str(tmp_path), "choices.json"])
    with pytest.raises(ConfigError):
        preference.main(["make", str(tmp_path), "--out", str(tmp_path / "page")])
    with pytest.raises(ConfigError):
        paper.main([str(tmp_path), "--out", str(tmp_path / "paper")])
    with pytest.raises(ConfigError):
        evaluation._check_plan(tmp_path, {"settings": {"seed": 1}, "sides": {}})
        raise ConfigError("a folder with its plan alone is gone on with")

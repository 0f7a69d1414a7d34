"""What is shown of a run costs the same, however long it is."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.nodes.jobs.view import MAX_LINES, MAX_SAMPLES
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.metrics import Digest
from comfyui_pcpo.trainers.report import refresh as reporting
from comfyui_pcpo.trainers.report.page import page_data, write_page
from comfyui_pcpo.trainers.run import keeper
from long_run_fixture import SPIKE, cost, line, long_run

ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=[3000, 20_000])
def run(request, tmp_path_factory) -> tuple[int, JobFolder]:
    """Runs of two lengths, with samples every 100 iterations."""
    root = tmp_path_factory.mktemp("jobs") / ID
    return request.param, long_run(root, request.param, every=100, images=2, side=48)


def numbers(lines: list[dict], name: str) -> list[float]:
    return [each[name] for each in lines if name in each]


def test_a_report_has_every_peak_and_no_more_lines(run):
    count, folder = run
    data = page_data(folder, Digest(folder.metrics_file, 2000).update())
    lines = data["metrics"]
    assert 500 < len(lines) <= 2000
    assert data["measured"]["count"] == count and data["measured"]["width"] > 1
    assert max(max(norms) for norms in numbers(lines, "grad_norms")) == SPIKE
    assert (lines[0]["iteration"], lines[-1]["iteration"]) == (1, count)
    every = folder.metrics()
    for name in ("reward", "grad_norm", "log_ratio_max", "images_per_second", "held_out"):
        assert max(numbers(lines, name)) == max(numbers(every, name))
        assert min(numbers(lines, name)) == min(numbers(every, name))
    assert data["summary"]["seconds"] == pytest.approx(sum(numbers(every, "seconds")))
    assert data["summary"]["after"] == every[-1]["held_out"]
    assert write_page(folder).stat().st_size < 3.5e6


def test_the_best_is_among_the_images(run):
    count, folder = run
    held = {each["iteration"]: each["held_out"] for each in folder.metrics() if "held_out" in each}
    data = page_data(folder, Digest(folder.metrics_file, 2000).update())
    shown = [column["iteration"] for column in data["samples"]["columns"]]
    assert (len(shown), shown[0], shown[-1]) == (8, 0, count)
    assert max(held, key=lambda iteration: held[iteration]) in shown
    assert data["samples"]["iterations_kept"] == count // 100 + 1


def test_a_job_in_detail_is_thinned_and_followed(run):
    count, folder = run
    jobs = JobRegistry(folder.root.parent)
    job = jobs.job(ID)
    assert len(json.dumps(job)) < 1.2e6
    assert len(job["metrics"]) <= MAX_LINES and job["measured"]["count"] == count
    assert job["metrics"][0]["iteration"] == 1  # the whole run, not only its end
    assert len(job["samples"]) <= MAX_SAMPLES + 1 and job["sampled"] == count // 100 + 1
    folder.add_metrics(line(count + 1, count, 100, random.Random(1)))
    assert jobs.job(ID)["metrics"][-1]["iteration"] == count + 1
    folder.cut_metrics(count)
    assert jobs.job(ID)["metrics"][-1]["iteration"] == count


def test_large_images_are_small_copies(tmp_path):
    folder = long_run(tmp_path, iterations=80, every=10, images=3, side=600)
    samples = page_data(folder, Digest(folder.metrics_file, 2000).update())["samples"]
    images = [image for column in samples["columns"] for image in column["images"]]
    assert len(images) == 8 * 3 and all(image.startswith("/9j/") for image in images)
    assert sum(map(len, images)) < (folder.root / "picture.png").stat().st_size * len(images) / 8


def test_a_report_is_rewritten_for_a_share_of_the_time(tmp_path, monkeypatch):
    now, written = [0.0], []

    def write(*_):
        written.append(now[0])
        now[0] += 2.0  # seconds that a report takes

    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(reporting, "write_page", write)
    reporter = reporting.Reporter(JobFolder(tmp_path), TrainConfig())
    for _ in range(100):
        now[0] += 1.0
        reporter.update()
        reporter._beside.submit(int).result()  # after what was begun
    assert written == [1.0, 43.0, 85.0]
    reporter.write()  # in the end, whatever the time
    assert len(written) == 4


IMPORTS = """
from pathlib import Path
import torch
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.pcpo.pictures import files as picture_files
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.report.page import write_page
---
"""


@pytest.mark.slow
def test_a_hundred_thousand_iterations(tmp_path):
    folder = long_run(tmp_path / ID, 100_000)
    seconds, grown = cost(IMPORTS + "write_page(JobFolder(Path(sys.argv[1])))", folder.root)
    assert seconds <= 5 and grown < 100
    assert (folder.report / "report.html").stat().st_size <= 10e6
    seconds, grown = cost(IMPORTS + "JobRegistry(Path(sys.argv[1])).jobs()", tmp_path)
    assert seconds <= 1 and grown < 20


@pytest.mark.slow
def test_a_thousand_jobs(tmp_path):
    for number in range(1000):
        long_run(tmp_path / f"{number:016x}", 20, every=20, images=1, side=8)
    seconds, grown = cost(IMPORTS + "JobRegistry(Path(sys.argv[1])).jobs()", tmp_path)
    assert seconds <= 1 and grown < 30


def test_the_last_report_is_never_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "SHARE", 1e-9)  # one report, and then none for years
    words = [
        *("train", "--preset", "demo", "--out", str(tmp_path / "run"), "--run.iterations", "3"),
        *("--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
        *("--sampler.steps", "2", "--method.selection", "all", "--run.micro-batch", "4"),
        *("--run.save-every", "1", "--run.eval-prompts", "1", "--run.eval-steps", "1"),
    ]
    written = []
    real = reporting.Reporter._write

    def write(self):
        real(self)
        written.append(page_data(self.folder, self._digest)["status"]["state"])

    monkeypatch.setattr(reporting.Reporter, "_write", write)
    assert main(words) == 0
    assert written == ["running", "done"]
    assert (tmp_path / "run" / "report" / "curves.png").is_file()


def test_a_pause_brings_the_report_up_to_date(monkeypatch):
    said = []
    monkeypatch.setattr(keeper, "memory_given_back", lambda setup: nullcontext())
    reporter = SimpleNamespace(write=lambda: said.append("written"))
    with keeper.Keeper.pause(SimpleNamespace(setup=None, reporter=reporter)):
        said.append("waits")
    assert said == ["written", "waits"]

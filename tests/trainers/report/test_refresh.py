"""The report of a run in progress is written beside the work, and is whole at every moment."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.report import refresh
from comfyui_pcpo.trainers.report.curves import plot_run
from comfyui_pcpo.trainers.report.images import before_after
from comfyui_pcpo.trainers.report.refresh import Reporter
from matplotlib.figure import Figure
from PIL import Image

LINE = {"iteration": 1, "reward": 0.5, "reward_std": 0.1, "grad_norm": 1.0}


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    folder = JobFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.add_metrics(LINE)
    return folder


def sampled(folder: JobFolder, iteration: int, colour: str, *rewards: float | None) -> Path:
    """Samples of one colour, complete if they have rewards."""
    place = folder.samples / f"{iteration:05}"
    place.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (16, 16), colour).save(place / f"{i:03}.png")
    if rewards:
        write_json(place / "scores.json", [{"prompt": "a cat", "reward": r} for r in rewards])
    return place


def colours(folder: JobFolder) -> list[tuple[int, ...]]:
    """In the middle of the two images of the first two pairs."""
    with Image.open(folder.report / "before_after.png") as sheet:
        return [sheet.getpixel((x, 50)) for x in (50, 250, 384, 584)]  # pyright: ignore[reportReturnType]


def test_the_work_does_not_wait_for_it_and_the_end_does(folder, monkeypatch):
    go, begun, written = threading.Event(), [], []

    def slow(_folder, digest):
        begun.append(threading.current_thread().name)
        assert go.wait(20)
        written.append(digest.count)

    monkeypatch.setattr(refresh, "write_page", slow)
    reporter = Reporter(folder, TrainConfig())
    reporter.update()
    for iteration in range(2, 9):
        folder.add_metrics(LINE | {"iteration": iteration})
        reporter.update()  # nothing: the first one is still being written
    assert written == [] and len(begun) <= 1
    go.set()
    reporter.write()
    assert len(written) == 2 and written[-1] == 8
    assert begun[0] != threading.current_thread().name == begun[1]


def test_what_stops_it_from_being_written_is_said_at_the_next_one(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(refresh, "write_page", full)
    reporter = Reporter(folder, TrainConfig())
    reporter.update()
    reporter._beside.submit(int).result()
    with pytest.raises(OSError, match="No space left"):
        reporter.update()


@pytest.mark.parametrize("kind", [Figure, Image.Image], ids=["curves", "before_after"])
def test_a_drawing_is_replaced_whole_or_not_at_all(folder, kind, monkeypatch):
    sampled(folder, 0, "red", 0.1, 0.2)
    sampled(folder, 1, "blue", 0.3, 0.1)

    def draw():
        plot_run([LINE], 0.2, folder.report / "curves.png", "a run")
        before_after(folder)

    def killed(_self, file, *_args, **_options):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    draw()
    before = {file.name: file.read_bytes() for file in folder.report.iterdir()}
    assert set(before) == {"curves.png", "before_after.png"}
    monkeypatch.setattr(kind, "savefig" if kind is Figure else "save", killed)
    with pytest.raises(KeyboardInterrupt):
        draw()
    assert {file.name: file.read_bytes() for file in folder.report.iterdir()} == before


def test_pairs_are_of_the_first_and_the_last_complete_samples(folder):
    first = sampled(folder, 0, "red", 0.1, None)
    before_after(folder)
    assert not folder.report.exists()  # nothing to compare with
    sampled(folder, 5, "lime", 0.3, 0.1)
    sampled(folder, 10, "blue", 0.3, 0.1)
    sampled(folder, 15, "black")  # is being written
    before_after(folder)
    red, blue = (255, 0, 0), (0, 0, 255)
    assert colours(folder) == [red, blue, red, blue]
    (first / "001.png").unlink()
    before_after(folder)
    assert colours(folder) == [red, blue, (255, 255, 255), blue]

"""metrics.jsonl: what is no line is passed over, only what is new is read, and no peak is lost."""

from __future__ import annotations

import json
import math
import random
from statistics import pvariance

import pytest
from comfyui_pcpo.trainers.job import metrics
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.metrics import Digest, Latest, Thinned

BROKEN = [
    b'{"iteration": 3, "rew',
    b"\xff\xfe\x00\x80",
    b'{"iteration": 3, "note": "\xff"}',
    b"[]",
    b"3",
    b'{"reward": 1}',
    b'{"iteration": "3"}',
    b'{"iteration": NaN}',
    b'{"iteration": ' + b"9" * 5000 + b"}",
    b'{"iteration": ' + b"9" * 400 + b"}",
    b"[" * 100_000,
]


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    return JobFolder(tmp_path)


def write(folder: JobFolder, *lines: dict | bytes) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    with folder.metrics_file.open("ab") as file:
        file.writelines(line + b"\n" for line in raw)


def numbers(count: int) -> list[dict]:
    return [{"iteration": i, "reward": 1 / i, "grad_norms": [0.5, i]} for i in range(1, count + 1)]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["torn", "whole"])
def test_what_is_no_line_is_passed_over(folder, broken, end):
    good = numbers(2)
    write(folder, *good)
    with folder.metrics_file.open("ab") as file:
        file.write(broken + end)
    file = folder.metrics_file
    assert folder.metrics() == metrics.last_lines(file, 9) == good
    assert Latest(file, ("iteration", "reward")).values() == {"iteration": 2, "reward": 0.5}
    assert Digest(file, 9).update().count == 2
    folder.cut_metrics(2)
    folder.add_metrics({"iteration": 3})
    assert folder.metrics() == [*good, {"iteration": 3}]


def test_values_that_are_no_numbers_are_left_out(folder):
    write(folder, {"iteration": 1, "reward": "x", "held_out": None, "kl": 10**400, "b": {"c": 1}})
    assert folder.metrics() == [{"iteration": 1}]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_lines_from_the_end_are_those_from_the_start(folder, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    write(folder, *numbers(30))
    text = folder.metrics_file.read_bytes()
    found = list(metrics.backwards(folder.metrics_file))[::-1]
    assert b"".join(raw for _, raw in found) == text
    assert all(text[at:].startswith(raw) for at, raw in found)
    assert metrics.last_lines(folder.metrics_file, 3) == numbers(30)[-3:]
    middle = found[20][0]
    assert list(metrics.backwards(folder.metrics_file, middle))[::-1] == found[20:]


def test_a_file_that_is_not_there(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert [*metrics.lines_of(file), *metrics.backwards(file), *metrics.last_lines(file, 3)] == []
    assert Latest(file, ("reward",)).values() == {} and Digest(file, 9).update().count == 0
    metrics.cut_after(file, 0)
    assert file.read_bytes() == b""


def test_what_is_cut_keeps_its_bytes(folder):
    write(folder, *numbers(5))
    text = folder.metrics_file.read_bytes()
    folder.cut_metrics(5)
    assert folder.metrics_file.read_bytes() == text
    folder.cut_metrics(3)
    assert folder.metrics_file.read_bytes() == b"".join(text.splitlines(keepends=True)[:3])
    folder.cut_metrics(0)
    assert folder.metrics_file.read_bytes() == b""


def test_a_last_line_without_its_end_gets_one(folder):
    folder.metrics_file.write_text('{"iteration": 1}')
    folder.cut_metrics(1)
    assert folder.metrics_file.read_bytes() == b'{"iteration": 1}\n'


def test_the_latest_values_cost_what_is_new(folder, monkeypatch):
    write(folder, {"iteration": 1, "held_out": 0.5}, *numbers(9999)[1:])
    latest = Latest(folder.metrics_file, ("iteration", "held_out"))
    assert latest.values() == {"iteration": 9999, "held_out": 0.5}
    read = []
    monkeypatch.setattr(
        metrics, "backwards", lambda file, since: read.extend(backwards(file, since)) or read
    )
    backwards = BACKWARDS
    assert latest.values()["iteration"] == 9999 and read == []
    write(folder, {"iteration": 10_000})
    assert latest.values() == {"iteration": 10_000, "held_out": 0.5} and len(read) == 1


BACKWARDS = metrics.backwards


# --- thinning ------------------------------------------------------------------------------------


def noise(count: int) -> list[dict]:
    chance = random.Random(0)
    lines = [{"iteration": i, "a": chance.gauss(0, 1), "b": 0.0} for i in range(1, count + 1)]
    for line in lines[499::500]:
        line["held_out"] = line["a"]
    return lines


@pytest.mark.parametrize("count", [150, 2000, 6000])
def test_every_peak_and_what_failed_stays(count):
    lines = noise(count)
    lines[count // 3]["a"] = 99.0
    lines[count // 3 + 1]["a"] = -99.0
    lines[count // 2]["b"] = math.nan
    lines[count // 2 + 1]["c"] = [1.0, 77.0]
    thinned = Thinned(200)
    for line in lines:
        thinned.add(line)
    kept = thinned.lines
    assert len(kept) <= 200 and kept == [lines[line["iteration"] - 1] for line in kept]
    for i in (0, count // 3, count // 3 + 1, count // 2, count // 2 + 1, -1):
        assert any(line is lines[i] for line in kept), i
    for start in range(0, count + 1, thinned.width):  # each stretch keeps its own extremes
        inside = range(start, start + thinned.width)
        values = [line["a"] for line in lines[max(0, start - 1) : start + thinned.width - 1]]
        own = [line["a"] for line in kept if line["iteration"] in inside]
        assert not values or (min(own), max(own)) == (min(values), max(values))


def test_few_measurements_stay_all_and_many_are_thinned():
    lines, thinned, every = noise(10_000), Thinned(200), Thinned(200)
    for line in lines:
        thinned.add(line)
        every.add({**line, "held_out": line["a"]})
    held = [line["iteration"] for line in thinned.lines if "held_out" in line]
    assert held == list(range(500, 10_001, 500))
    assert len(every.lines) <= 200


def test_few_lines_are_not_thinned():
    thinned = Thinned(200)
    for line in noise(200):
        thinned.add(line)
    assert thinned.lines == noise(200) and thinned.width == 1


# --- digest --------------------------------------------------------------------------------------


def test_a_digest_is_the_same_however_often_it_looks(folder):
    lines = [
        {"seconds": 0.5, "images_per_second": i % 7, **line, "grad_norms": [line["a"], 1.0]}
        for i, line in enumerate(noise(3000))
    ]
    often = Digest(folder.metrics_file, 200)
    for start in range(0, 3000, 500):
        write(folder, *lines[start : start + 500])
        often.update()
    once = Digest(folder.metrics_file, 200).update()
    for digest in (often, once):
        assert (digest.count, digest.seconds, digest.images_per_second) == (3000, 1500.0, 3)
        assert digest.held_out == lines[-1]["held_out"]
        assert digest.best == max((x["held_out"], x["iteration"]) for x in lines if "held_out" in x)
    assert often.curves.lines == once.curves.lines
    for line in once.curves.lines[1:]:
        i = line["iteration"]
        norms = [norm for each in lines[max(0, i - 10) : i] for norm in each["grad_norms"]]
        assert line[metrics.VARIANCE] == pytest.approx(pvariance(norms))
    folder.cut_metrics(1000)
    assert often.update().count == 1000 and often.seconds == 500.0

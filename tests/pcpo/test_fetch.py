"""Weight files from a server: resumed, verified, and in place only when whole."""

from __future__ import annotations

import hashlib
import shutil
import sys
import types
from pathlib import Path

import pytest
from comfyui_pcpo.pcpo.pretrained import fetch
from comfyui_pcpo.pcpo.pretrained.catalogue import WEIGHTS
from comfyui_pcpo.pcpo.pretrained.fetch import NotFetched, part_of
from source_fixture import Source

DATA = bytes(range(256)) * 4096  # 1 MiB
SUM = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    monkeypatch.setattr(fetch, "BLOCK", 1 << 16)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "models" / "net" / "file.safetensors"


def got(source, target, watch=lambda *_: None, size=1 << 20):
    fetch.fetch(source.url, target, size, SUM, watch)


def kept(target):
    return part_of(target).read_bytes() if part_of(target).exists() else None


def test_a_file_is_loaded_verified_and_put_in_place(target):
    seen = []
    with Source(DATA) as source:
        got(source, target, lambda *now: seen.append(now))
    assert target.read_bytes() == DATA
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    assert [name for name, *_ in seen] == ["loading"] * 16 + ["checking"] * 16
    assert seen[0] == ("loading", 1 << 16, len(DATA)) and seen[15][1] == len(DATA)
    assert source.asked == [None]


def test_it_goes_on_where_the_connection_broke(target):
    with Source(DATA) as source:
        source.cut = [300_000, 200_000]
        got(source, target)
    assert target.read_bytes() == DATA
    assert source.asked == [None, "bytes=300000-", "bytes=500000-"]


def test_it_goes_on_where_an_earlier_one_ended(target):
    target.parent.mkdir(parents=True)
    part_of(target).write_bytes(DATA[:1000])
    with Source(DATA) as source:
        got(source, target)
    assert target.read_bytes() == DATA
    assert source.asked == ["bytes=1000-"]


def test_what_is_whole_already_is_verified_alone(target):
    target.parent.mkdir(parents=True)
    part_of(target).write_bytes(DATA)
    with Source(DATA) as source:
        got(source, target)
    assert target.read_bytes() == DATA
    assert source.asked == [f"bytes={len(DATA)}-"]


@pytest.mark.parametrize("before", [DATA[:5000], DATA + b"more"])
def test_a_server_that_ignores_ranges_sends_all(target, before):
    target.parent.mkdir(parents=True)
    part_of(target).write_bytes(before)
    with Source(DATA) as source:
        source.has_ranges = False
        got(source, target)
    assert target.read_bytes() == DATA


def test_more_than_there_is_begins_anew(target):
    target.parent.mkdir(parents=True)
    part_of(target).write_bytes(DATA + b"more")
    with Source(DATA) as source:
        got(source, target)
    assert target.read_bytes() == DATA and source.asked == [f"bytes={len(DATA) + 4}-", None]


def test_a_break_for_good_keeps_what_has_arrived(target):
    with Source(DATA) as source:
        source.cut = [300_000, 0, 0]
        with pytest.raises(NotFetched, match=r"^The connection broke \(.*\); what has arrived is"):
            got(source, target)
    assert kept(target) == DATA[:300_000] and not target.exists()


def test_waiting_for_another_try_can_be_ended(target):
    with Source(DATA) as source:
        source.cut = [300_000]
        seen = []

        def watch(*now):
            if now in seen:  # told again while it waits
                raise KeyError
            seen.append(now)

        with pytest.raises(KeyError):
            got(source, target, watch)
    assert source.asked == [None]


def test_another_file_is_not_kept(target):
    with Source(DATA[::-1]) as source, pytest.raises(NotFetched, match="another file") as told:
        got(source, target)
    assert hashlib.sha256(DATA[::-1]).hexdigest() in str(told.value)
    assert not target.exists() and kept(target) is None


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_source_without_the_file_is_told(target, status):
    with Source(DATA) as source:
        source.status = status
        with pytest.raises(NotFetched, match=rf"^The source does not answer \(HTTP {status}\);"):
            got(source, target)
    assert kept(target) is None


def test_a_source_that_is_not_there_is_told(target):
    gone = types.SimpleNamespace(url="http://127.0.0.1:9/file")
    with pytest.raises(NotFetched, match=r"^The source does not answer"):
        got(gone, target)


def test_a_file_of_another_size_is_not_loaded(target):
    with Source(DATA) as source, pytest.raises(NotFetched, match=r"it offers 1\.05 MB instead of"):
        got(source, target, size=5_000_000)
    assert kept(target) is None


def test_a_disk_that_cannot_take_it_is_asked_first(target, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10_000))
    with Source(DATA) as source, pytest.raises(NotFetched, match=r"^The disk is full: 269 MB are"):
        got(source, target)
    assert kept(target) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_disk_that_fills_up_is_told(target, monkeypatch):
    monkeypatch.setattr(fetch, "part_of", lambda _: Path("/dev/full"))
    monkeypatch.setattr(fetch, "_check_room", lambda *_: None)
    with Source(DATA) as source, pytest.raises(NotFetched, match=r"^The disk is full: 1\.05 MB"):
        got(source, target)


@pytest.mark.skipif(sys.platform == "win32", reason="a folder that nobody may write to")
def test_a_place_that_cannot_be_written_is_told(target):
    target.parent.parent.mkdir(parents=True)
    target.parent.write_text("a file where the folder should be")
    with Source(DATA) as source, pytest.raises(NotFetched, match=r"^The file cannot be written"):
        got(source, target)


def test_what_the_watcher_raises_ends_the_work_and_keeps_what_has_arrived(target):
    def watch(state, done, size):
        if done > 500_000:
            raise KeyError(state)

    with Source(DATA) as source, pytest.raises(KeyError):
        got(source, target, watch)
    assert kept(target) == DATA[: 8 << 16] and not target.exists()


def test_only_files_whose_checksum_is_known_are_offered():
    offered = {key for key, file in WEIGHTS.items() if fetch.is_offered(file)}
    assert offered >= {"aesthetic_head", "clip_l_vision", "pick_score", "image_reward", "hps_v2"}
    assert "hps_v2_1" not in offered  # none is published
    assert "deberta" not in offered  # of what lies beside it there is none
    for key in offered:
        assert fetch.source_of(WEIGHTS[key]).startswith("https://")

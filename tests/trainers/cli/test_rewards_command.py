"""`pcpo rewards`: what is listed, and getting weights from a hub on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest
from comfyui_pcpo.pcpo.pretrained.catalogue import WEIGHTS
from comfyui_pcpo.pcpo.pretrained.read import sha256_of
from comfyui_pcpo.pcpo.rewards import REWARDS
from comfyui_pcpo.trainers.cli.command import main
from http_fixture import Reply, Scripted
from hub_fixture import hub

VOCABULARY = b"[PAD]\n[UNK]\n[CLS]\n" * 10
REMOTE = "google-bert/bert-base-uncased/vocab.txt"
DEBERTA = WEIGHTS["deberta"]


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """No weights of this machine are seen."""
    monkeypatch.setenv("PCPO_REWARDS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def pcpo(address, *words):
    """The command in a process of its own, which knows the hub's address from its start."""
    known = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "comfyui_pcpo.trainers", "rewards", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | known,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_all_rewards_are_listed_with_what_they_lack(capsys):
    assert main(["rewards", "list"]) == 0
    said = capsys.readouterr().out
    for name in REWARDS:
        assert any(line.startswith(f"{name} ") for line in said.splitlines()), name
    state = {line.split()[0]: line for line in said.splitlines() if line[:1] not in ("", " ")}
    assert state["scene"].endswith("ready")
    lacking = state["hps_v2_1"]
    assert "MISSING weights (HPS_v2.1_compressed.pt, about 1.97 GB)" in lacking


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_each_reward_explains_itself(name, capsys):
    assert main(["rewards", "list", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}\n") and "range" in said
    assert Counter(said.split())["state"] + Counter(said.split())["missing"] >= 1


def test_options_that_a_reward_has_from_others_are_explained(capsys):
    assert main(["rewards", "list", "vlm_judge"]) == 0
    said = capsys.readouterr().out
    assert "option    retries = 3\n          tries after the first one" in said
    assert "option    highest = 10.0\n          largest one" in said
    assert "Attributes" not in said


def test_what_is_no_reward_is_refused(capsys):
    assert main(["rewards", "list", "beauty"]) == 2
    assert "there is no reward 'beauty'" in capsys.readouterr().err
    assert main(["rewards", "get", "scene"]) == 2
    assert "'scene' has no weights to get" in capsys.readouterr().err


def test_a_file_is_got_shown_and_verified(tmp_path):
    with hub({REMOTE: VOCABULARY}) as address:
        unsure = pcpo(address, "get", "bert_vocab")
        assert unsure.returncode == 1, unsure.stderr
        assert "0.0 MB, licence Apache-2.0 (unverified)" in unsure.stdout
        assert "add --yes" in unsure.stdout and not (tmp_path / "models").exists()
        done = pcpo(address, "get", "bert_vocab", "--yes")
    assert done.returncode == 0, done.stderr
    target = tmp_path / "models" / "reward_models" / "bert-base-uncased" / "vocab.txt"
    assert target.read_bytes() == VOCABULARY
    assert f"sha256 {sha256_of(target)[:16]}... verified" in done.stdout
    assert [file.name for file in target.parent.iterdir()] == ["vocab.txt"]
    again = pcpo("http://127.0.0.1:9", "get", "bert_vocab", "--yes")  # nobody is asked again
    assert again.returncode == 0 and "is there already" in again.stdout


def test_what_lies_beside_a_file_comes_with_it(tmp_path):
    names = [DEBERTA.file, *DEBERTA.beside]
    files = {f"{DEBERTA.repo}/{name}": name.encode() for name in names}
    with hub(files) as address:
        done = pcpo(address, "get", "deberta", "--yes", "--folder", str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / "mine" / DEBERTA.folder / DEBERTA.name).parent
    assert {file.name: file.read_text() for file in folder.iterdir()} == {n: n for n in names}
    assert "set PCPO_REWARDS to" in done.stdout


def test_what_arrives_damaged_is_not_kept(tmp_path):
    with hub({REMOTE: VOCABULARY}, {REMOTE: VOCABULARY[::-1]}) as address:
        done = pcpo(address, "get", "bert_vocab", "--yes")
    assert done.returncode == 2
    assert "What arrived is another file than the one published: its sha256 is" in done.stderr
    assert not any(file.is_file() for file in (tmp_path / "models").rglob("*"))


def test_another_file_than_the_known_one_is_refused(tmp_path):
    head = WEIGHTS["aesthetic_head"]
    with hub({f"{head.repo}/{head.file}": b"another head"}) as address:
        done = pcpo(address, "get", "aesthetic_head", "--yes")
    assert done.returncode == 2
    assert "is not the file that it should be" in done.stderr and head.sha256 in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("files", [{}, None])
def test_without_the_file_or_a_network_the_way_by_hand_is_told(files, tmp_path):
    if files is None:
        done = pcpo("http://127.0.0.1:9", "get", "hps_v2_1", "--yes")
    else:
        with hub(files) as address:
            done = pcpo(address, "get", "hps_v2_1", "--yes")
    assert done.returncode == 2
    assert "cannot be had from the hub" in done.stderr
    assert "put it into models/reward_models as HPS_v2.1_compressed.pt" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "models").exists()


# --- files that are not on the hub ---------------------------------------------------------------

LINES = b"weights" * 1000
LOCAL = """
import dataclasses, sys
from comfyui_pcpo.pcpo.pretrained import catalogue
from comfyui_pcpo.trainers.cli.command import main
there = catalogue.WEIGHTS["alexnet"]
catalogue.WEIGHTS["alexnet"] = dataclasses.replace(there, url=sys.argv[1], sha256=sys.argv[2])
raise SystemExit(main(["rewards", "get", "alexnet", "--yes"]))
"""


def got_from(address, digest):
    command = [sys.executable, "-c", LOCAL, address, digest]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_file_is_got_from_its_makers_page(tmp_path):
    """The first digits of its hash, which are in its name, suffice to verify it."""
    begins = hashlib.sha256(LINES).hexdigest()[:8]
    with Scripted(lambda asked: Reply(LINES)) as server:
        done = got_from(f"{server.url}/models/alexnet.pth", begins)
        methods = [asked.method for asked in server.asked]
    assert done.returncode == 0, done.stderr
    assert methods == ["HEAD", "GET"]
    target = tmp_path / "models" / "reward_models" / "alexnet-owt-7be5be79.pth"
    assert target.read_bytes() == LINES
    assert f"{server.url}/models/alexnet.pth: 0.0 MB" in done.stdout
    assert f"sha256 {begins}" in done.stdout and "... verified" in done.stdout
    assert [file.name for file in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (Reply(LINES), "was not loaded. What arrived is another file than the one published"),
        (Reply(b"", status=404), "cannot be had (HTTPError: HTTP Error 404"),
        (Reply(LINES, missing=100), "was not loaded. The connection broke ("),
    ],
)
def test_a_file_that_does_not_arrive_whole_from_there_is_not_kept(tmp_path, reply, told):
    with Scripted(lambda asked: reply) as server:
        done = got_from(f"{server.url}/alexnet.pth", "00000000")
    assert done.returncode == 2
    assert told in done.stderr and done.stderr.count("\n") == 1
    left = [file.suffix for file in (tmp_path / "models").rglob("*") if file.is_file()]
    assert left == ([".part"] if reply.missing else [])


def test_a_file_that_broke_off_goes_on_where_it_was(tmp_path):
    target = tmp_path / "models" / "reward_models" / "alexnet-owt-7be5be79.pth"
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.part").write_bytes(LINES[:3000])

    def answer(asked):
        if asked.method == "HEAD":
            return Reply(LINES)
        whole = len(LINES)
        ranged = {"Content-Range": f"bytes 3000-{whole - 1}/{whole}"}
        return Reply(LINES[3000:], status=206, headers=ranged)

    with Scripted(answer) as server:
        done = got_from(f"{server.url}/alexnet.pth", hashlib.sha256(LINES).hexdigest())
    assert done.returncode == 0, done.stderr
    assert server.asked[-1].headers["Range"] == "bytes=3000-"
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    assert target.read_bytes() == LINES


def test_what_metrics_there_are_weights_for_is_told(capsys):
    assert main(["rewards", "get", "fd_random"]) == 2
    said = capsys.readouterr().err
    assert "metrics: fid, inception_score, fd_dinov2, lpips, lpips_vgg" in said
    assert "inception_2015" in said

"""`pcpo taste` with odd votes, lost files and several writers: one clear sentence, nothing lost."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request

import pytest
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.cli.taste_page import Page
from comfyui_pcpo.trainers.taste.store import Pair, Store
from taste_fixture import pictures, still_open, voted


def run(capsys, *words):
    status = main(["taste", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out + err


def voted_with(root, choices):
    """A taste with these choices on pairs of its own."""
    store = Store.new(root)
    digests = [store.add_image(picture) for picture in pictures(2 * len(choices))]
    for i, choice in enumerate(choices):
        pair = Pair(left=digests[2 * i], right=digests[2 * i + 1], random=True)
        store.put([pair])
        store.vote(pair, choice)
    return store


@pytest.fixture
def taste(tmp_path):
    """A taste of 40 votes."""
    return voted(tmp_path / "taste", votes=40)[0]


# --- votes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([], "cannot be fitted: it has no votes yet; choose pictures with "),
        (["tie", "neither"], "cannot be fitted: its 2 votes are all ties; choose pictures with "),
        (["skip"] * 3, "cannot be fitted: it has no votes yet; choose pictures with "),
    ],
)
def test_votes_that_decide_nothing(tmp_path, capsys, choices, said):
    voted_with(tmp_path / "taste", choices)
    status, told = run(capsys, "fit", tmp_path / "taste")
    assert status == 2 and said in told and told.count("\n") == 1
    assert run(capsys, "show", tmp_path / "taste")[0] == 0


def test_one_sided_votes(tmp_path, capsys):
    voted_with(tmp_path / "taste", ["right"] * 12)
    status, told = run(capsys, "fit", tmp_path / "taste")
    assert status == 0 and "all 12 choices fell on the right picture" in told


def test_contradictory_votes(taste, capsys):
    about = taste.votes()[0]
    other = Pair(left=about.left, right=about.right, random=True)
    taste.put([other])
    taste.vote(other, "right" if about.choice == "left" else "left")
    status, told = run(capsys, "fit", taste.root)
    assert status == 0 and "1 pairs were decided both ways" in told and "41 votes" in told


# --- files ---------------------------------------------------------------------------------------


def test_a_picture_that_is_gone(taste, capsys):
    taste.image_file(taste.votes()[0].left).unlink()
    lost = 40 - len(Store(taste.root).votes())
    status, told = run(capsys, "fit", taste.root)
    assert status == 0 and f"{lost} votes are about pictures that are gone, and left out" in told
    assert run(capsys, "rank", taste.root)[0] == 0
    assert run(capsys, "export", taste.root, taste.root.parent / "out")[0] == 0


def test_all_pictures_gone(taste, capsys):
    for file in (taste.root / "images").iterdir():
        file.unlink()
    status, told = run(capsys, "fit", taste.root)
    assert status == 2 and "no votes yet (40 votes are about pictures that are gone" in told
    assert told.count("\n") == 1
    assert len((taste.root / "votes.jsonl").read_text().splitlines()) == 40


def test_a_picture_that_cannot_be_read(taste, capsys):
    file = taste.image_file(taste.votes()[0].left)
    file.write_bytes(b"no picture")
    for words in (["fit", taste.root], ["fit", taste.root, "--prior", "aesthetic"]):
        status, told = run(capsys, *words)
        assert status == 2 and told.count("\n") == 1
    assert f"{file.name} cannot be read" in run(capsys, "fit", taste.root)[1]


def test_a_damaged_line(taste, capsys):
    with (taste.root / "votes.jsonl").open("ab") as file:
        file.write(b'{"id": "1\n')
    status, told = run(capsys, "fit", taste.root)
    assert status == 0 and "votes.jsonl line 41 is damaged and left out" in told
    assert "fitted to 40 votes" in told


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"votes": 3}'])
def test_a_damaged_record(taste, capsys, text):
    (taste.root / "taste.json").write_text(text)
    status, told = run(capsys, "show", taste.root)
    assert status in (0, 2) and "Traceback" not in told
    assert run(capsys, "fit", taste.root)[0] == 0
    assert "agrees with you on" in run(capsys, "show", taste.root)[1]


def test_a_head_of_other_features(taste, capsys, monkeypatch):
    from comfyui_pcpo.pcpo.rewards import taste as module

    run(capsys, "fit", taste.root)
    kept = dict(module.FEATURES)
    monkeypatch.setattr(module, "FEATURES", {"finer": kept["grid"]})
    status, told = run(capsys, "rank", taste.root)
    assert status == 2 and "is of the features 'grid', which are not known here" in told
    status, told = run(capsys, "fit", taste.root)
    assert status == 2 and "there are no features 'grid'; choose one of finer" in told
    assert len(Store(taste.root).votes()) == 40


# --- several writers -----------------------------------------------------------------------------


def asked(page, what, **body):
    data = json.dumps(body).encode()
    with urllib.request.urlopen(page.address + what, data, timeout=60) as answer:
        return json.loads(answer.read())


def test_two_pages_of_one_taste_vote_at_once(tmp_path):
    """Two processes know nothing of each other but the folder."""
    store = voted(tmp_path / "taste", votes=1)[0]
    still_open(store, 40)
    pages = [Page(Store(store.root)) for _ in range(2)]
    servers = [threading.Thread(target=page.serve_forever) for page in pages]
    faults = []

    def vote(page, window):
        try:
            now = asked(page, "next", window=window)
            for _ in range(15):
                about = {"pair": now["pair"]["id"], "choice": "left", "window": window}
                now = asked(page, "vote", **about)
        except Exception as error:
            faults.append(error)

    for server in servers:
        server.start()
    windows = [threading.Thread(target=vote, args=(page, f"w{i}")) for i, page in enumerate(pages)]
    for window in windows:
        window.start()
    for window in windows:
        window.join()
    for page, server in zip(pages, servers, strict=True):
        page.shutdown()
        server.join()
        page.server_close()
    assert not faults
    lines = [json.loads(line) for line in (store.root / "votes.jsonl").read_text().splitlines()]
    assert len(lines) == 31 and Store(store.root).faults() == []
    # a pair that both showed counts once
    assert len(Store(store.root).votes()) == len({line["pair"] for line in lines})


# --- privacy -------------------------------------------------------------------------------------


def test_nothing_leaves_the_machine(tmp_path, capsys, monkeypatch):
    """No command connects or looks up anything, and the page listens on loopback alone."""
    tried = []

    def refused(self, address, *rest):
        tried.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: tried.append(words))
    monkeypatch.setenv("PCPO_REWARDS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run(capsys, "new", tmp_path / "empty")
    store = voted(tmp_path / "taste", votes=40)[0]
    for words in (["fit"], ["show"], ["rank"], ["fit", "--features", "siglip"]):
        run(capsys, words[0], store.root, *words[1:])
    run(capsys, "export", store.root, tmp_path / "out")
    with Page(store) as page:
        page.desk.act("next", {"window": "w"})
        assert page.socket.getsockname()[0] == "127.0.0.1"
    run(capsys, "delete", store.root, "--yes")
    assert tried == []


def test_what_remains_of_a_deleted_taste_is_said(taste, capsys):
    said = (taste.root / "README.txt").read_text()
    assert "Everything stays on this machine" in said and "keeps the heads" in said
    images = {file.name for file in (taste.root / "images").iterdir()}
    _, told = run(capsys, "delete", taste.root, "--yes")
    assert "runs that trained on it keep their heads" in told
    left = {file.name for file in taste.root.parent.rglob("*") if file.is_file()}
    assert images and not left & images

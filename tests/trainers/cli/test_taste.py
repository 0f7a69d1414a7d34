"""`pcpo taste`: the commands, the imports, and the page and its guard."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import pytest
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.cli.taste_page import Page
from comfyui_pcpo.trainers.taste.store import Store
from evaluation_fixture import picture_folder
from PIL import Image
from taste_fixture import digest_utilities, pictures, redness, voted


def run(capsys, *words):
    status = main(["taste", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out + err


def saved(folder, items, names=None):
    folder.mkdir()
    for i, picture in enumerate(items):
        picture.save(folder / f"{i:03}.png")
    return folder


def test_from_an_empty_taste_to_a_ranking(tmp_path, capsys):
    taste = tmp_path / "taste"
    assert run(capsys, "new", taste)[0] == 0
    assert "it was not fitted yet" in run(capsys, "show", taste)[1]
    items = sorted(pictures(60), key=redness)
    liked, disliked = saved(tmp_path / "red", items[30:]), saved(tmp_path / "not", items[:30])
    for _ in range(2):  # imported twice, counted once
        said = run(capsys, "import", taste, "--liked", liked, "--disliked", disliked)[1]
        assert "240 votes imported" in said or "votes imported; fit them" in said
    votes = Store(taste).votes()
    assert 100 < len(votes) <= 240 and not any(vote.random for vote in votes)
    assert "never tested on random pairs" in run(capsys, "fit", taste)[1]
    new = saved(tmp_path / "new", sorted(pictures(5, seed=8), key=redness))
    _, said = run(capsys, "rank", taste, new)
    order = [line.rpartition("/")[2] for line in said.splitlines()[1:]]
    assert order[0] == "004.png" and order[-1] == "000.png"


def test_stars_are_random_pairs(tmp_path, capsys):
    items = pictures(40)
    saved(tmp_path / "all", items)
    rank = sorted(map(redness, items))
    stars = [1 + rank.index(redness(picture)) * 5 // 40 for picture in items]
    rows = [f"all/{i:03}.png,{star}" for i, star in enumerate(stars)]
    (tmp_path / "stars.csv").write_text("\n".join(["file,stars", *rows]))
    run(capsys, "new", tmp_path / "taste")
    assert run(capsys, "import", tmp_path / "taste", "--stars", tmp_path / "stars.csv")[0] == 0
    votes = Store(tmp_path / "taste").votes()
    assert {vote.choice for vote in votes} == {"left", "right", "tie"}
    said = run(capsys, "fit", tmp_path / "taste")[1]
    assert "agrees with you on" in said and "does not know you" not in said


def test_choices_of_a_preference_page(tmp_path, capsys):
    sides = [
        picture_folder(tmp_path / name, {f"prompt {i}": [grey, grey + 9] for i in range(5)})
        for name, grey in (("dark", 20), ("bright", 220))
    ]
    page = tmp_path / "page"
    assert main(["preference", "make", *map(str, sides), "--out", str(page)]) == 0
    key = json.loads((page / "key.json").read_text())
    chosen = {
        str(i): "left" if pair["left"] == "bright" else "right"
        for i, pair in enumerate(key["pairs"])
    }
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"page": key["page"], "choices": chosen}))
    taste = tmp_path / "taste"
    run(capsys, "new", taste)
    assert run(capsys, "import", taste, file, "--page", page)[0] == 0
    store = Store(taste)
    assert len(store.votes()) == 10 and all(vote.prompt for vote in store.votes())
    for vote in store.votes():
        liked = vote.left if vote.choice == "left" else vote.right
        with Image.open(store.image_file(liked)) as picture:
            assert picture.getpixel((0, 0))[0] > 200
    file.write_text(json.dumps({"page": "other", "choices": chosen}))
    assert "is not of the page in" in run(capsys, "import", taste, file, "--page", page)[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,stars\na.png,3", "stars.csv needs the columns file and stars"),
        ("file,stars\na.png,6", "stars.csv line 2: stars is '6'; give 1, 2, 3, 4 or 5"),
        ("file,stars\nb.png,3", "b.png is no file"),
        ("file,stars\na.png,3\na.png,3", "all pictures have equal stars"),
        ("file,stars\nstars.csv,3", "cannot be read as a picture"),
    ],
)
def test_stars_that_cannot_be_used(tmp_path, capsys, text, said):
    pictures(1)[0].save(tmp_path / "a.png")
    (tmp_path / "stars.csv").write_text(text)
    run(capsys, "new", tmp_path / "taste")
    status, told = run(capsys, "import", tmp_path / "taste", "--stars", tmp_path / "stars.csv")
    assert status == 2 and said in told
    assert Store(tmp_path / "taste").votes() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "nowhere"], "holds no taste; make one with"),
        (["fit", "taste"], "it has no votes yet"),
        (["fit", "taste", "--features", "x"], "there are no features 'x'; choose one of grid"),
        (["fit", "taste", "--prior", "x"], "--prior is 'x'; choose one of aesthetic"),
        (["rank", "taste"], "it after its first fit"),
        (["ask", "taste"], "there are no two pictures to choose from; give a folder"),
        (["import", "taste"], "give --liked and --disliked, or --stars, or --page"),
        (["export", "taste"], "give one folder to export to"),
        (["like", "taste"], "what is 'like'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Store.new("taste")
    status, told = run(capsys, *words)
    assert status == 2 and said in told and told.count("\n") == 1


def test_export_and_delete(tmp_path, capsys, monkeypatch):
    store, _ = voted(tmp_path / "taste", votes=10)
    assert run(capsys, "export", store.root, tmp_path / "out")[0] == 0
    lines = (tmp_path / "out" / "votes.csv").read_text().splitlines()
    assert lines[0] == "time,prompt,left,right,choice,random,source" and len(lines) == 11
    used = {d for vote in store.votes() for d in (vote.left, vote.right)}
    assert {file.stem for file in (tmp_path / "out" / "images").iterdir()} == used
    monkeypatch.setattr("builtins.input", lambda text: "n")
    run(capsys, "delete", store.root)
    assert store.root.is_dir()
    run(capsys, "delete", store.root, "--yes")
    assert not store.root.exists()


def test_weights_that_are_missing_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PCPO_REWARDS", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    voted(tmp_path / "taste", votes=5)
    status, told = run(capsys, "fit", tmp_path / "taste", "--features", "clip_l")
    assert status == 2 and "CLIP" in told


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    store = Store.new(tmp_path / "taste")
    items = pictures(30)
    store.offer(items, [""] * 30, "x")
    with Page(store) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def ask(page, what, body=None, address=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request((address or page.address) + what, data, headers)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_page_of_pairs_is_voted_on(page):
    store = page.desk.store
    utilities = digest_utilities(store, pictures(30))
    status, html = ask(page, "")
    assert status == 200 and b"Which picture do you like better?" in html and b"{{" not in html
    for _ in range(12):
        pair = json.loads(ask(page, "next", {"window": "w"})[1])["pair"]
        assert ask(page, f"image/{pair['left']}")[1].startswith(b"\x89PNG")
        choice = "left" if utilities[pair["left"]] > utilities[pair["right"]] else "right"
        assert ask(page, "vote", {"pair": pair["id"], "choice": choice})[0] == 200
    assert len(store.votes()) == 12
    assert json.loads(ask(page, "undo", {})[1])["undone"]["choice"] == store_choice(store)
    assert len(store.votes()) == 11
    assert json.loads(ask(page, "ranking")[1])["first"]


def store_choice(store):
    lines = (store.root / "votes.jsonl").read_text().splitlines()
    undone = json.loads(lines[-1])["undo"]
    return next(json.loads(line)["choice"] for line in lines if json.loads(line)["id"] == undone)


def test_the_page_is_for_this_machine_and_its_own_address_alone(page):
    assert page.server_address[0] == "127.0.0.1"
    elsewhere = page.address.replace(page.token, "x" * 32)
    assert ask(page, "next", {"window": "w"}, elsewhere)[0] == 403
    assert ask(page, "next", {}, Host="evil.example")[0] == 403
    assert ask(page, "next", {}, Origin="http://evil.example")[0] == 403
    assert ask(page, "nothing")[0] == 404 and ask(page, "nothing", {})[0] == 404
    assert ask(page, "image/..%2f..%2fvotes.jsonl")[0] == 409
    assert ask(page, "vote", [1])[0] == 400
    status, told = ask(page, "vote", {"pair": "0" * 32, "choice": "left"})
    assert status == 409 and b"reload the page" in told
    assert ask(page, "undo", {"x": "y" * 100_000})[0] == 413
    assert page.desk.store.votes() == []


def test_a_deleted_taste_is_one_clear_sentence_on_the_page(page):
    pair = json.loads(ask(page, "next", {"window": "w"})[1])["pair"]
    page.desk.store.delete()
    status, told = ask(page, "vote", {"pair": pair["id"], "choice": "left"})
    assert status == 409 and b"moved or deleted" in told

"""The folder of a taste: many writers, kills, damage, undo, deletion."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from comfyui_pcpo.trainers.taste import learn
from comfyui_pcpo.trainers.taste import store as store_module
from comfyui_pcpo.trainers.taste.desk import Desk
from comfyui_pcpo.trainers.taste.store import Pair, Store, TasteError, Vote
from PIL import Image
from taste_fixture import digest_utilities, pictures, redness, voted


@pytest.fixture
def store(tmp_path):
    return Store.new(tmp_path / "taste")


def one_pair(store, seed=0, **about):
    left, right = (store.add_image(picture) for picture in pictures(2, seed))
    pair = Pair(left=left, right=right, **about)
    store.put([pair])
    return pair


# --- votes ---------------------------------------------------------------------------------------


def test_a_vote_says_what_it_is_about(store):
    pair = one_pair(store, prompt="a cat", source="job x", random=True)
    store.vote(pair, "left")
    (line,) = (store.root / "votes.jsonl").read_text().splitlines()
    vote = json.loads(line)
    assert (vote["left"], vote["right"], vote["choice"]) == (pair.left, pair.right, "left")
    assert (vote["prompt"], vote["source"], vote["random"]) == ("a cat", "job x", True)
    assert abs(vote["time"] - time.time()) < 60
    assert store.waiting() == []


def test_undo_is_a_line_and_brings_the_pair_back(store):
    pair = one_pair(store)
    store.vote(pair, "left")
    assert store.undo().choice == "left"
    assert store.votes() == [] and store.waiting() == [pair]
    assert len((store.root / "votes.jsonl").read_text().splitlines()) == 2
    assert store.undo() is None
    store.vote(pair, "right")
    store.vote(pair, "tie")  # of two votes on one pair the last counts
    assert [vote.choice for vote in store.votes()] == ["tie"]


def test_a_skipped_pair_is_neither_counted_nor_shown_again(store):
    pair = one_pair(store)
    store.vote(pair, "skip")
    assert store.votes() == [] and store.waiting() == []


def test_another_reader_sees_new_votes(store):
    other, pair = Store(store.root), one_pair(store)
    assert other.votes() == []
    store.vote(pair, "left")
    assert [vote.choice for vote in other.votes()] == ["left"]
    other.undo()
    assert store.votes() == []


def test_the_newest_source_is_asked_about_first(store):
    for seed, source in enumerate(("old", "new", "new")):
        one_pair(store, seed, source=source)
    assert [pair.source for pair in store.waiting()] == ["new", "new", "old"]


def write_many(root, count):
    store = Store(root)
    for _ in range(count):
        left, right = (store.add_image(picture) for picture in pictures(2))
        pair = Pair(left=left, right=right)
        store.put([pair])
        store.vote(pair, "left")


def test_several_processes_write_at_once(store):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(store.root, 25)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(store.votes()) == 100 and store.faults() == []
    assert len(list((store.root / "images").glob("*"))) == 2  # equal pictures are kept once


def test_threads_that_read_at_once_see_each_line_once(store):
    store.put([Pair(left="0" * 64, right="1" * 64)] * 2000)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            other = Store(store.root)
            assert {len(found) for found in pool.map(lambda _: other.asked(), range(8))} == {2000}  # noqa: B023


def test_a_killed_writer_loses_no_vote(store):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_store import write_many\n"
        "from pathlib import Path\n"
        "print('up', flush=True)\n"
        "write_many(Path(sys.argv[1]), 100000)"
    )
    paths = [str(store.root), str(__file__).rpartition("test_store")[0]]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    worker = subprocess.Popen(
        [sys.executable, "-c", script, *paths], stdout=subprocess.PIPE, env=environment
    )
    worker.stdout.readline()
    while len(store.votes()) < 20 and worker.poll() is None:
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    seen = len(store.votes())
    assert seen >= 20
    assert len(Store(store.root).votes()) == seen
    store.vote(one_pair(store), "left")  # no lock is left behind
    assert len(store.votes()) == seen + 1


def test_a_line_that_was_cut_off_is_passed_over_and_reported(store):
    pair = one_pair(store)
    store.vote(pair, "left")
    with (store.root / "votes.jsonl").open("ab") as file:
        file.write(b'{"id": "12')  # a kill in the middle of a line
    assert len(store.votes()) == 1 and store.faults() == []  # it may still be being written
    other = one_pair(store, 1)
    store.vote(other, "right")
    assert [vote.choice for vote in store.votes()] == ["left", "right"]
    (fault,) = store.faults()
    assert fault.startswith("votes.jsonl line 2 is damaged and left out")


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"{}", b"[]", b'{"id":"00000000","pair":"0","choice":"up"}', b'{"undo":1}'],
)
def test_a_damaged_line_costs_no_other(store, line):
    pair = one_pair(store)
    (store.root / "votes.jsonl").write_bytes(line + b"\n")
    store.vote(pair, "left")
    assert len(store.votes()) == 1
    assert "votes.jsonl line 1 is damaged" in store.faults()[0]


def test_votes_about_a_picture_that_is_gone_are_left_out(store):
    pair = one_pair(store)
    store.vote(pair, "left")
    store.image_file(pair.left).unlink()
    assert store.votes() == []
    assert store.faults() == ["1 votes are about pictures that are gone, and left out"]


@pytest.mark.parametrize("choice", ["up", "", "LEFT"])
def test_what_is_no_choice_is_refused(store, choice):
    with pytest.raises(TasteError, match="is no choice; give one of left, right, tie"):
        store.vote(one_pair(store), choice)
    assert not (store.root / "votes.jsonl").exists()


# --- the folder ----------------------------------------------------------------------------------


def test_pictures_are_kept_exactly_and_without_their_metadata(store, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    (picture,) = pictures(1)
    told = PngInfo()
    told.add_text("workflow", "a secret")
    picture.save(tmp_path / "a.png", pnginfo=told)
    with Image.open(tmp_path / "a.png") as opened:
        digest = store.add_image(opened)
    assert b"secret" not in store.image_file(digest).read_bytes()
    with Image.open(store.image_file(digest)) as kept:
        assert kept.tobytes() == picture.tobytes()
    assert store.add_image(picture) == digest


def test_the_folder_says_what_it_holds(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=20)
    learn.refit(store)
    told = (store.root / "README.txt").read_text()
    for path in store.root.iterdir():
        assert path.name in told or path.suffix == ".lock" or path.name == "README.txt"
    assert "Everything stays on this machine" in told


def test_deleting_a_taste_deletes_its_pictures(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=5)
    store.delete()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TasteError, match="is gone: it was moved or deleted"):
        store.vote(Pair(left="0" * 64, right="1" * 64), "left")


def test_a_folder_in_use_is_no_new_taste(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(TasteError, match="is not empty"):
        Store.new(tmp_path)
    with pytest.raises(TasteError, match="holds no taste; make one with"):
        Store(tmp_path)


# --- fitting -------------------------------------------------------------------------------------


def test_a_taste_is_learnt(tmp_path):
    store, utilities = voted(tmp_path / "taste", votes=100, count=60)
    head = learn.refit(store)
    new = pictures(60, seed=5)
    scores = head.score(head.z(grid(new)))
    from scipy.stats import spearmanr

    assert spearmanr(scores, [redness(picture) for picture in new]).statistic > 0.9
    said = learn.summary(store.result())
    assert said[0] == "fitted to 100 votes, 100 of them on random pairs"
    assert said[1].startswith("agrees with you on ")
    best, worst = learn.ranked(store)
    assert utilities[best[0]] > 0.2 > 0 > utilities[worst[0]]


def grid(items):
    import torch
    from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
    from comfyui_pcpo.pcpo.rewards.taste import grid_features

    return grid_features(torch.cat([pixels_of(picture) for picture in items]))


def test_without_a_decided_vote_nothing_is_fitted(store):
    with pytest.raises(TasteError, match=r"it has no votes yet; choose pictures with .*taste ask"):
        learn.refit(store)
    for seed, choice in enumerate(("tie", "neither")):
        store.vote(one_pair(store, seed), choice)
    with pytest.raises(TasteError, match="its 2 votes are all ties"):
        learn.refit(store)


def test_one_decided_vote_is_enough_and_is_not_relied_on(store):
    store.vote(one_pair(store), "left")
    head = learn.refit(store)
    assert head.doubt.startswith("the taste does not know you yet: it has 1 votes")


def test_one_sided_and_contradictory_votes_are_named(store):
    items = pictures(24)
    digests = [store.add_image(picture) for picture in items]
    for left, right in zip(digests[::2], digests[1::2], strict=True):
        store.vote(Pair(left=left, right=right), "left")
    learn.refit(store)
    assert "all 12 choices fell on the left picture" in learn.summary(store.result())
    store.vote(Pair(left=digests[1], right=digests[0]), "left")
    learn.refit(store)
    assert any(note.startswith("1 pairs were decided both") for note in store.result()["notes"])


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=5)
    file = store.image_file(store.votes()[0].left)
    file.write_bytes(b"no picture")
    with pytest.raises(TasteError, match=f"{file.name} cannot be read"):
        learn.refit(store)


def test_ten_thousand_votes_stay_quick(tmp_path):
    store, utilities = voted(tmp_path / "taste", votes=1, count=300)
    draw, digests = random.Random(1), [*utilities]
    drawn = [draw.sample(digests, 2) for _ in range(10_000)]
    pairs = [Pair(left=left, right=right, random=True) for left, right in drawn]
    store.put(pairs)
    votes = []
    for pair in pairs:
        choice = "left" if utilities[pair.left] > utilities[pair.right] else "right"
        about = pair.model_dump(include={"left", "right", "random"})
        votes.append(Vote(pair=pair.id, choice=choice, **about))
    store.record(votes)
    began = time.process_time()
    learn.refit(store)
    assert time.process_time() - began < 20  # 2.5 s of one idle core
    desk = Desk(store)
    desk.state()
    began = time.process_time()
    for _ in range(10):
        desk.state()
    assert time.process_time() - began < 5  # 0.05 s each


# --- asking --------------------------------------------------------------------------------------


def test_half_of_the_pairs_are_random_and_none_has_a_picture_twice(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=40)
    head = learn.refit(store)
    pairs = learn.draw(store, store.offers(), 8, head, random.Random(0))
    assert [pair.random for pair in pairs] == [True] * 4 + [False] * 4
    assert len({d for pair in pairs for d in (pair.left, pair.right)}) == 16
    asked = {frozenset((pair.left, pair.right)) for pair in store.asked()}
    assert not asked & {frozenset((pair.left, pair.right)) for pair in pairs}
    assert all(pair.random for pair in learn.draw(store, store.offers(), 8, None, random.Random(0)))


def test_pictures_of_one_prompt_are_compared(store):
    store.offer(pictures(6), ["a", "a", "a", "b", "b", "c"], "x")
    pairs = learn.draw(store, store.offers(), 8, None, random.Random(0))
    prompt = {offer.image: offer.prompt for offer in store.offers()}
    assert sorted(pair.prompt for pair in pairs) == ["a", "b"]
    assert all(prompt[pair.left] == prompt[pair.right] == pair.prompt for pair in pairs)


def test_the_gain_of_more_votes_is_that_of_the_last_doubling():
    assert learn.more_votes([(25, 0.6), (50, 0.7), (100, 0.76)]).endswith("about 6% more")
    assert "little" in learn.more_votes([(25, 0.7), (50, 0.74), (100, 0.75)])


def test_a_desk_asks_learns_and_asks_again(tmp_path):
    store = Store.new(tmp_path / "taste")
    items = pictures(30)
    store.offer(items, [""] * 30, "x")
    utilities, desk = digest_utilities(store, items), Desk(store)
    for _ in range(40):
        pair = desk.next("a")["pair"]
        desk.vote(pair["id"], "left" if utilities[pair["left"]] > utilities[pair["right"]] else
                  "right")  # fmt: skip
    state = desk.next("a")
    assert state["votes"] == 40 and len(state["last"]) == 8
    assert any(line.startswith("agrees with you on") for line in state["said"])
    assert {pair.random for pair in store.asked()} == {True, False}
    best = desk.ranking()["first"]
    assert utilities[best[0]] > sorted(utilities.values())[-6]


def test_two_windows_are_shown_different_pairs(tmp_path):
    store = Store.new(tmp_path / "taste")
    store.offer(pictures(20), [""] * 20, "x")
    desk = Desk(store)
    one, other = desk.next("a")["pair"], desk.next("b")["pair"]
    assert one["id"] != other["id"]
    assert desk.next("a")["pair"] == one  # a reload shows the same
    desk.vote(one["id"], "left")
    desk.vote(other["id"], "right")
    assert len(store.votes()) == 2
    last = store.votes()[1]
    assert desk.undo()["undone"]["id"] == last.id


def test_undo_takes_back_what_no_other_window_cast_and_shows_it_again(tmp_path):
    store = Store.new(tmp_path / "taste")
    store.offer(pictures(40), [""] * 40, "x")
    desk = Desk(store)
    one, other = (desk.next(window)["pair"]["id"] for window in "ab")
    desk.act("vote", {"window": "a", "pair": one, "choice": "left"})
    desk.act("vote", {"window": "b", "pair": other, "choice": "left"})
    told = desk.act("undo", {"window": "a"})
    assert told["undone"]["pair"] == told["pair"]["id"] == one
    assert desk.act("undo", {"window": "a"})["undone"] is None
    assert desk.act("next", {"window": "b"})["pair"]["id"] != one
    assert Desk(store).act("undo", {"window": "c"})["undone"]["pair"] == other  # of before


def test_a_page_is_told_the_pictures_that_come_next(tmp_path):
    store = Store.new(tmp_path / "taste")
    store.offer(pictures(20), [""] * 20, "x")
    desk = Desk(store)
    told = desk.next("a")
    for _ in range(3):
        soon = told["soon"]
        told = desk.act("vote", {"window": "a", "pair": told["pair"]["id"], "choice": "left"})
        assert [told["pair"]["left"], told["pair"]["right"]] == soon


def test_pictures_of_other_prompts_are_compared_once_those_of_one_are_through(tmp_path):
    store = Store.new(tmp_path / "taste")
    store.offer(pictures(6), ["a", "a", "b", "b", "c", "d"], "x")
    desk, asked = Desk(store), []
    while (pair := desk.next("w")["pair"]) is not None:
        asked.append(pair["prompt"])
        desk.vote(pair["id"], "left")
    assert sorted(asked[:2]) == ["a", "b"] and len(asked) == 15  # of 6 pictures
    assert not any(asked[2:])


def test_what_was_voted_is_known_while_many_pairs_wait(tmp_path):
    store = Store.new(tmp_path / "taste")
    store.offer(pictures(40), [""] * 40, "x")
    desk = Desk(store)
    desk.ask(pictures(40, seed=1), [""] * 40, "y", 20)
    for _ in range(9):
        desk.act("vote", {"pair": desk.next("w")["pair"]["id"], "choice": "left"})
    desk.close()
    desk._round.result()
    assert store.result()["votes"] >= 8 and len(store.waiting()) == 11


def test_of_many_votes_a_few_more_are_not_fitted_at_once(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=100)
    desk = Desk(store)
    first = desk.fit().digest
    for seed, is_new in ((100, False), (102, False), (104, True)):
        store.vote(one_pair(store, seed), "left")
        assert (desk.fit().digest != first) == is_new


def test_a_desk_says_what_is_wrong_and_goes_on(tmp_path):
    store = Store.new(tmp_path / "taste")
    assert Desk(store).next("a")["pair"] is None
    store.offer(pictures(12), [""] * 12, "x")
    desk = Desk(store)
    pair = desk.next("a")["pair"]
    with pytest.raises(TasteError, match="not one of this taste"):
        desk.vote("0" * 32, "left")
    desk.vote(pair["id"], "left")
    store.image_file(pair["left"]).write_bytes(b"no picture")
    while (now := desk.next("a"))["pair"] is not None:
        desk.vote(now["pair"]["id"], "left")
    assert any("cannot be read" in line for line in now["said"])


def test_a_taste_whose_features_are_not_there_is_still_voted_on(tmp_path, monkeypatch):
    for variable in ("HF_HOME", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    store, _ = voted(tmp_path / "taste", votes=30)
    store.keep_result({**learn_result(), "features": "clip_l"})
    shown = Desk(store, folders=[str(tmp_path)]).next("a")
    assert shown["pair"] is not None  # at random
    words = "CLIP ViT-L/14"
    assert words in shown["said"][-1] and "\n" not in shown["said"][-1]
    with pytest.raises(TasteError, match=words):
        learn.refit(store, folders=[str(tmp_path)])


def learn_result():
    """What a fit leaves, as far as it is read."""
    rest = {"doubt": "", "notes": [], "curve": [], "tested": 0}
    return {"votes": 1, "random": 1, **rest}


def test_a_damaged_head_is_fitted_again(tmp_path):
    store, _ = voted(tmp_path / "taste", votes=30)
    first = learn.refit(store).digest
    assert learn.up_to_date(store).digest == first
    (store.root / "head.safetensors").write_bytes(b"damaged")
    assert learn.head_of(store) is None
    assert learn.up_to_date(store).digest == first == learn.head_of(store).digest
    (store.root / "head.safetensors").unlink()
    assert Desk(store).fit().digest == first


def test_what_writes_after_a_deletion_makes_no_folder_again(store):
    pair = one_pair(store)
    late = Store(store.root)
    store.delete()
    work = {
        "image": lambda: late.add_image(pictures(1)[0]),
        "offer": lambda: late.offer(pictures(1), [""], ""),
        "pair": lambda: late.put([pair]),
        "votes": lambda: late.record([Vote(pair=pair.id, choice="left", **about(pair))]),
        "vote": lambda: late.vote(pair, "left"),
        "result": lambda: late.keep_result({}),
        "votes read": late.votes,
    }
    for task in work.values():
        with pytest.raises(TasteError, match="is gone: it was moved or deleted"):
            task()
    assert not store.root.exists()
    Store.new(store.root)


def about(pair):
    return {"left": pair.left, "right": pair.right}


def test_what_waits_for_the_lock_while_it_is_deleted_makes_no_folder_again(store, monkeypatch):
    late, lock = Store(store.root), store_module.FileLock

    def deleted_meanwhile(path):
        monkeypatch.setattr(store_module, "FileLock", lock)
        store.delete()
        return lock(path)

    monkeypatch.setattr(store_module, "FileLock", deleted_meanwhile)
    with pytest.raises(TasteError, match="is gone: it was moved or deleted"):
        late.add_image(pictures(1)[0])
    assert not store.root.exists()

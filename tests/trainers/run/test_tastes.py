"""A run that trains on a taste: which head scores, new votes while it trains, the region."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import processes_fixture
import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.pcpo.rewards.taste import Head
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.errors import Stopped
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.job.prompts import split_prompts
from comfyui_pcpo.trainers.run import tastes
from comfyui_pcpo.trainers.run.rewards import RewardSet
from comfyui_pcpo.trainers.run.start import resume, train
from comfyui_pcpo.trainers.run.tastes import Tastes
from comfyui_pcpo.trainers.run.update.learner import Learner
from comfyui_pcpo.trainers.taste.learn import refit
from comfyui_pcpo.trainers.taste.store import Store
from PIL import Image
from taste_fixture import redness, still_open, voted
from warm_fixture import started


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def taste(tmp_path):
    """A taste of 40 votes."""
    store, _ = voted(tmp_path / "taste", votes=40)
    refit(store)
    return store


def config_of(folder, **sections):
    small = {
        "model": {"source": "demo"},
        "rewards": {"taste": {"options": {"folder": str(folder)}}},
        "sampler": {"steps": 3},
        "prompts": {"per_iteration": 2, "images_per_prompt": 3},
        "run": {"iterations": 4, "save_every": 4, "eval_prompts": 0, "device": "cpu"},
        "optimizer": {"updates": 1},
        "taste": {"ask_every": 1, "pairs": 2},
    }
    for name, values in sections.items():
        small[name] = {**small[name], **values}
    return TrainConfig.model_validate(small)


def answered(store, count=None):
    """Vote for the redder picture of pairs that wait."""
    for pair in store.waiting()[:count]:
        values = []
        for digest in (pair.left, pair.right):
            with Image.open(store.image_file(digest)) as picture:
                values.append(redness(picture))
        store.vote(pair, "left" if values[0] > values[1] else "right")


@pytest.fixture
def voter(monkeypatch):
    """Answers what is asked after an iteration, if that is among its numbers."""
    numbers = set[int]()
    ask = Tastes.ask

    def asked(self, number, line, folder, config, say):
        ask(self, number, line, folder, config, say)
        if number in numbers:
            for reward in self.rewards.values():
                answered(Store(reward.folder))

    monkeypatch.setattr(Tastes, "ask", asked)
    return numbers


def state_of(root):
    newest = max((root / "checkpoints").iterdir())
    return (newest / "state.safetensors").read_bytes()


def raw_lines(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def test_votes_that_come_while_it_trains_count_from_the_next_iteration_on(tmp_path, taste, voter):
    voter.add(2)
    first = Head.load(taste.root / "head.safetensors").digest
    train(config_of(taste.root), tmp_path / "run")
    lines = raw_lines(tmp_path / "run")
    assert [line["votes_taste"] for line in lines] == [40, 40, 44, 44]
    heads = [line["head_taste"] for line in lines]
    assert heads[0] == heads[1] == first != heads[2] == heads[3]
    state = json.loads((tmp_path / "run" / "checkpoints" / "00004" / "state.json").read_text())
    assert state["heads"] == {"taste": heads[3]}
    kept = {file.stem for file in (tmp_path / "run" / "taste").glob("*.safetensors")}
    assert kept == {first, heads[2]}
    asked = [pair for pair in taste.asked() if pair.source.startswith("run, iteration ")]
    assert len(asked) == 8  # two each time
    assert all(pair.prompt for pair in asked)
    prompts = {offer.image: offer.prompt for offer in taste.offers()}
    assert all(prompts[pair.left] == prompts[pair.right] for pair in asked)
    assert {pair.random for pair in asked} == {True, False}


def test_a_run_goes_on_to_the_same_bytes_however_many_votes_come(
    tmp_path, taste, voter, monkeypatch
):
    voter.add(1)
    again = tmp_path / "again"
    shutil.copytree(taste.root, again)
    seen, moments = Learner.step, []

    def late(folder):
        """Votes that come while iteration 3 trains, which has begun."""
        moments.append(folder)
        if len(moments) == 3:
            answered(Store(folder))

    monkeypatch.setattr(Learner, "step", lambda *a, **k: (late(taste.root), seen(*a, **k))[1])
    train(config_of(taste.root), tmp_path / "run")

    moments.clear()

    def stopped(self, *arguments, **options):
        late(again)
        if len(moments) == 3:
            raise Stopped("stopped")
        return seen(self, *arguments, **options)

    monkeypatch.setattr(Learner, "step", stopped)
    config = config_of(again)
    with pytest.raises(Stopped):
        train(config, tmp_path / "other" / "run")
    assert len(raw_lines(tmp_path / "other" / "run")) == 2
    resume(tmp_path / "other" / "run")
    numbers = [line["votes_taste"] for line in raw_lines(tmp_path / "run")]
    assert numbers[2] < numbers[3] and numbers[0] < numbers[1]
    ours, theirs = (raw_lines(root) for root in (tmp_path / "run", tmp_path / "other" / "run"))
    for one, other in zip(ours, theirs, strict=True):
        same = {k for k in one if not k.startswith(("seconds", "images_per"))}
        assert {k: one[k] for k in same} == {k: other[k] for k in same}
    assert state_of(tmp_path / "run") == state_of(tmp_path / "other" / "run")


def test_a_killed_run_that_asks_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """Votes come in the second iteration, and a kill of the process with them."""
    stores = [voted(tmp_path / name / "taste", votes=40)[0] for name in ("whole", "killed")]
    runs = [store.root.parent / "run" for store in stores]
    for store in stores:
        refit(store)
        still_open(store)
    words = [["train", str(tmp_path / f"{i}.json"), "--out", str(runs[i])] for i in (0, 1)]
    for i, store in enumerate(stores):
        config = config_of(store.root, run={"checkpoint_every": 1})
        (tmp_path / f"{i}.json").write_text(config.model_dump_json())
    monkeypatch.setenv("TASTE", str(stores[1].root))
    script = Path(processes_fixture.__file__)
    process = started(script, tmp_path / "seen", *words[1], env={"FAULT": "kill 0"})
    monkeypatch.setenv("TASTE", str(stores[0].root))
    with processes_fixture.recorded(tmp_path / "alone"):
        assert main(words[0]) == 0
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert len(raw_lines(runs[1])) == 1 and len(stores[1].votes()) == 52
    AcceleratorState._reset_state(reset_partial_state=True)
    resume(runs[1])
    ours, theirs = (raw_lines(root) for root in runs)
    assert [line["votes_taste"] for line in theirs] == [40, 40, 52, 52]
    assert [line["head_taste"] for line in theirs] == [line["head_taste"] for line in ours]
    assert state_of(runs[0]) == state_of(runs[1])


def test_the_heads_of_a_checkpoint_are_those_that_a_run_goes_on_with(tmp_path, taste, voter):
    """A damaged list of heads costs nothing; a lost head is one sentence."""
    config = config_of(taste.root, taste={"ask_every": 0, "pairs": 8}, run={"iterations": 1})
    train(config, tmp_path / "run")
    first = raw_lines(tmp_path / "run")[0]["head_taste"]
    (tmp_path / "run" / "taste" / "used.jsonl").write_text("damaged\n")
    taste.vote(taste.asked()[0], "tie")
    assert refit(taste).digest != first
    AcceleratorState._reset_state(reset_partial_state=True)
    resume(tmp_path / "run", iterations=2)
    assert raw_lines(tmp_path / "run")[1]["head_taste"] == first
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "run" / "taste" / f"{first}.safetensors").unlink()
    with pytest.raises(JobError, match=rf"{first}.safetensors, .* is gone; put it back, or start"):
        resume(tmp_path / "run", iterations=3)


def test_a_taste_deleted_while_a_job_uses_it_costs_a_sentence(tmp_path, taste, voter, monkeypatch):
    said, ask = [], Tastes.ask

    def deleting(self, number, *rest):
        ask(self, number, *rest)
        if number == 2:
            taste.delete()

    monkeypatch.setattr(Tastes, "ask", deleting)
    from comfyui_pcpo.trainers.report.progress import Progress

    progress = Progress.silent()
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    train(config_of(taste.root), tmp_path / "run", progress)
    assert len(raw_lines(tmp_path / "run")) == 4
    told = [text for text in said if "holds no taste" in text]
    assert any(text.endswith("the run goes on with the head of 40 votes") for text in told)
    assert len(told) == 2  # and once that nothing is asked
    AcceleratorState._reset_state(reset_partial_state=True)
    resume(tmp_path / "run", iterations=5)  # with the head that the run keeps
    assert raw_lines(tmp_path / "run")[4]["votes_taste"] == 40


def test_votes_since_the_start_change_no_run_that_does_not_ask(tmp_path, taste, voter):
    config = config_of(taste.root, taste={"ask_every": 0, "pairs": 8}, run={"iterations": 2})
    train(config, tmp_path / "run")
    assert not any(pair.source for pair in taste.asked() if pair.source != "")
    first = raw_lines(tmp_path / "run")[0]["head_taste"]
    pair = taste.asked()[0]
    taste.vote(pair, "tie")
    refit(taste)
    AcceleratorState._reset_state(reset_partial_state=True)
    resume(tmp_path / "run", iterations=3)
    assert raw_lines(tmp_path / "run")[2]["head_taste"] == first


def test_images_far_from_the_votes_are_measured_and_asked_about(tmp_path, taste, capsys):
    """The demo's pictures are unlike the smooth ones of this taste."""
    words = ["train", "--preset", "demo", "--out", str(tmp_path / "run"), "--rewards", "taste", "1"]
    words += ["--reward-options", f"taste.folder={taste.root}", "--taste.ask-every", "100"]
    words += ["--run.iterations", "1", "--run.eval-prompts", "0", "--sampler.steps", "3"]
    words += ["--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"]
    assert main([*words, "--taste.pairs", "2"]) == 0
    (line,) = JobFolder(tmp_path / "run").metrics()
    assert line["distance_taste"] > 1 and 0 < line["outside_taste"] <= 1
    assert "unlike those that the reward 'taste' was voted on" in capsys.readouterr().out
    assert any("iteration 1" in pair.source for pair in taste.asked())


def test_a_taste_that_does_not_know_you_warns_before_training(tmp_path, capsys):
    store, _ = voted(tmp_path / "taste", votes=8)
    refit(store)
    rewards = {"taste": {"options": {"folder": str(store.root)}}}
    reward_set = RewardSet.from_config(TrainConfig.model_validate({"rewards": rewards}))
    (doubt,) = reward_set.tastes.doubts()
    assert doubt.startswith("the reward 'taste': the taste does not know you yet: it has 8 votes")


def test_a_taste_without_a_head_is_refused_before_the_model_is_loaded(tmp_path):
    Store.new(tmp_path / "taste")
    with pytest.raises(ConfigError, match="a taste has it after its first fit"):
        train(config_of(tmp_path / "taste"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_are_of_several_prompts(taste):
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    found = Tastes({}, {})
    found.pictures = [(images[:20], ["a"] * 10 + ["b"] * 10), (images[20:], ["c"] * 20)]
    import random

    chosen = found._some(8, random.Random(0))
    counts = [sum(prompt == name for _, prompt in chosen) for name in "abc"]
    assert sorted(counts) == [0, 4, 4]
    assert len(found._some(1000, random.Random(0))) == 3 * tastes.CANDIDATES


def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path):
    folder = JobFolder(tmp_path)
    folder.taste.mkdir()
    whole = '{"iteration": 0, "heads": {"mine": "first"}}\n'  # as runs of before wrote it
    (folder.taste / "used.jsonl").write_text(whole + '{"iteration": 1, "hea')
    used = tastes.Used(iteration=1, heads={"mine": "second"})
    tastes._log(folder).append([used])
    for digest in ("first", "second"):
        (folder.taste / f"{digest}.safetensors").touch()
    found = [tastes.used_heads(folder, iteration)["mine"] for iteration in (0, 1, 2)]
    assert [Path(file).stem for file in found] == ["first", "second", "second"]


@pytest.mark.parametrize(("max_drift", "done"), [(0.02, 2), (0.0, 3)])
def test_a_guard_ends_a_run_on_a_taste_that_goes_too_far(tmp_path, taste, max_drift, done):
    guard = {"every": 1, "prompts": 2, "images": 2, "min_diversity": 0, "max_drift": max_drift}
    config = config_of(
        taste.root,
        run={"iterations": 3, "eval_prompts": 2},
        optimizer={"lr": 0.02, "warmup": 0},
    )
    values = config.model_dump() | {"guard": guard}
    values["method"] |= {"kl_weight": 0.03}
    train(TrainConfig.model_validate(values), tmp_path / "run")
    lines, record = raw_lines(tmp_path / "run"), JobFolder(tmp_path / "run").guard_record()
    assert len(lines) == done and bool(record["ended"]) == (done < 3)
    assert [line["guard_strikes"] for line in lines] == ([1, 2] if done < 3 else [0, 0, 0])
    assert all(line["guard_drift"] > 0.02 and line["kl"] >= 0 for line in lines)
    assert all(line["distance_taste"] > 0 for line in lines)
    trained = {pair.prompt for pair in taste.asked() if pair.source.startswith("run, iteration")}
    held_out = set(split_prompts(config.prompts, 2).held_out)
    assert trained and not trained & held_out  # what the guard draws is not asked about

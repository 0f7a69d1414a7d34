"""The guard: a run that collapses is ended, its best iteration kept, and the training unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.pcpo.rewards import RewardUnavailable
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.compare.folder import check
from comfyui_pcpo.trainers.config.sections import GuardConfig
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig, validate
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.job.preflight import preflight
from comfyui_pcpo.trainers.run import checkpoint
from comfyui_pcpo.trainers.run.guard import measures as guard_measures
from comfyui_pcpo.trainers.run.guard.measures import Measures
from comfyui_pcpo.trainers.run.guard.rules import Look, Rules, start_of
from comfyui_pcpo.trainers.run.iteration import Iteration

SMALL = [
    *("--preset", "demo", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "3", "--run.micro-batch", "4", "--run.iterations", "5"),
    *("--run.save-every", "20", "--run.eval-prompts", "8", "--run.eval-steps", "2"),
    *("--run.keep-checkpoints", "1"),
]
COLLAPSE = [  # noise instead of shapes within two iterations
    *("--optimizer.lr", "0.05", "--optimizer.warmup", "0", "--rewards", "jpeg_compressibility", "1")
]
GUARD = [
    *("--guard.every", "1", "--guard.prompts", "8", "--guard.images", "2"),
    *("--guard.max-drift", "0.35", "--guard.reward", "scene"),
]
TIMED = ("seconds", "seconds_rollout", "seconds_update", "images_per_second")


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(root: Path, *options: str) -> JobFolder:
    assert main(["train", *SMALL, *COLLAPSE, "--out", str(root), *options]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return JobFolder(root)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> JobFolder:
    root = tmp_path_factory.mktemp("guarded")
    published = root / "loras" / "mine.safetensors"
    return train(root / "run", *prompts_of(root), *GUARD, "--run.publish", str(published))


def prompts_of(root: Path) -> list[str]:
    """Two prompts, of which eight are to be held out."""
    file = root / "prompts.txt"
    file.write_text("a red circle above a blue square\na green triangle\n", encoding="utf-8")
    return ["--prompts.source", str(file)]


def lines_of(folder: JobFolder, *left_out: str) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in (*TIMED, *left_out)} for line in folder.metrics()
    ]


# --- a run that collapses ------------------------------------------------------------------------


def test_a_collapse_is_caught_and_the_best_is_the_one_before(guarded):
    lines, record = guarded.metrics(), guarded.guard_record()
    drift = [line["guard_drift"] for line in lines]
    assert [line["guard_strikes"] for line in lines] == [0, 1, 2]  # of 5 iterations
    assert drift[0] < 0.35 < min(drift[1:])
    assert record["best"] == 1 and record["ended"]
    status = guarded.read("status.json")
    assert (status["state"], status["iteration"], status["of"]) == ("done", 3, 5)
    assert status["message"].startswith(
        f"ended by the guard at iteration 3: drift in pixels is {drift[2]:.3g}, above 0.35; the "
        "best within the bounds is iteration 1, with a reward of "
    )
    best = guarded.lora / "pcpo_00001.safetensors"
    published = guarded.root.parent / "loras" / "mine.safetensors"
    assert published.read_bytes() == best.read_bytes()
    kept = sorted(path.name for path in guarded.checkpoints.iterdir())
    assert kept == ["00001", "00003"]  # one is kept, besides the best
    held_out = lines[0]["held_out"]
    assert status["message"].endswith(f"-> {held_out:.3f}")


def test_without_a_guard_the_same_run_goes_on(guarded, tmp_path):
    free = train(tmp_path / "free", *prompts_of(tmp_path))
    assert free.read("status.json")["iteration"] == 5
    own = ["held_out", *[name for name in guarded.metrics()[0] if name.startswith("guard")]]
    assert lines_of(free, "held_out")[:3] == lines_of(guarded, *own)  # looking changes nothing
    assert not free.guard.exists() and not free.guard_record()


def test_what_looks_on_is_told(guarded):
    page = (guarded.report / "report.html").read_text(encoding="utf-8")
    record = guarded.guard_record()
    assert "at 2 held-out prompts, 2 images each" in record["rule"]  # all that there are
    assert record["rule"] in page and record["said"] in page
    assert "export function guardCurves" in page
    assert record["values"]["guard_drift"] == {
        "name": "drift in pixels",
        "start": 0.0,
        "bound": 0.35,
    }
    assert record["values"]["guard_second"]["name"] == "scene"
    inputs = guarded.job()["inputs"]["rewards"]
    assert set(inputs) == {"jpeg_compressibility", "scene (guard)"}


def test_an_ended_run_stays_ended(guarded, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(guarded.root, again)
    (again / "status.json").unlink()  # killed before it could say so
    assert main(["resume", str(again)]) == 0
    folder = JobFolder(again)
    assert lines_of(folder) == lines_of(guarded)
    before = guarded.read("status.json")["message"].partition("; /")[0]
    assert folder.read("status.json")["message"].startswith(before)
    assert "pcpo_00001.safetensors" in capsys.readouterr().out


def test_a_broken_run_goes_on_to_the_same_bytes(guarded, tmp_path, monkeypatch):
    iteration_of = Iteration.of

    def breaking(number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return iteration_of(number, *rest)

    root = tmp_path / "broken"
    monkeypatch.setattr(Iteration, "of", breaking)
    words = ["train", *SMALL, *COLLAPSE, *GUARD, *prompts_of(guarded.root.parent)]
    assert main([*words, "--out", str(root)]) == 130
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Iteration, "of", iteration_of)
    folder = JobFolder(root)
    assert [line["guard_strikes"] for line in folder.metrics()] == [0, 1]
    assert main(["resume", str(root)]) == 0
    assert lines_of(folder) == lines_of(guarded)
    assert folder.guard_record() == guarded.guard_record()
    for name in ("pcpo_00001.safetensors", "pcpo_00003.safetensors"):
        assert (folder.lora / name).read_bytes() == (guarded.lora / name).read_bytes()


def test_without_the_base_s_images_it_does_not_go_on(guarded, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(guarded.root, again)
    shutil.rmtree(again / "guard" / "base")
    assert main(["resume", str(again)]) == 2
    assert "what the guard compares with is gone" in capsys.readouterr().err
    assert JobFolder(again).read("status.json")["state"] == "failed"


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(tmp_path):
    config = TrainConfig()
    written = config.model_dump(mode="json")
    del written["guard"]
    (tmp_path / checkpoint.STATE).write_text(json.dumps({"config": written}))
    checkpoint._check_config(tmp_path, config)
    changed = validate({"guard": {"every": 3}}, "a test")
    with pytest.raises(JobError, match=r"guard.every was 0, is 3"):
        checkpoint._check_config(tmp_path, changed)


# --- rules ---------------------------------------------------------------------------------------

START = Look(reward=0.5, diversity=0.4, second=6.0)
ASKED = GuardConfig(every=5, reward="aesthetic", max_fall=0.5, max_drift=0.3)


@pytest.mark.parametrize(
    ("look", "faults"),
    [
        (Look(0.9, 0.2, 0.3, 5.5), []),  # at every bound
        (Look(0.9, 0.19, 0, 6), ["pixel diversity is 0.19, below 0.2 (the base has 0.4)"]),
        (Look(0.9, 0.4, 0.31, 6), ["drift in pixels is 0.31, above 0.3"]),
        (Look(0.9, 0.4, 0, 5.4), ["aesthetic is 5.4, below 5.5 (the base has 6)"]),
        (Look(0.9, 0.1, 0.5, 5), ["pixel diversity is", "drift in pixels is", "aesthetic is"]),
    ],
)
def test_bounds(look, faults):
    found = Rules(ASKED, START).faults(look)
    assert len(found) == len(faults)
    assert all(text.startswith(start) for text, start in zip(found, faults, strict=True))


def test_bounds_that_are_none():
    rules = Rules(GuardConfig(every=1, min_diversity=0), START)
    assert rules.faults(Look(0, 0, 1, -100)) == ()
    assert "It has no bounds" in rules.sentence


def test_best_patience_and_sentences():
    rules, strikes, best = Rules(ASKED, START), 0, None
    good, bad = Look(0.6, 0.4, 0, 6), Look(0.9, 0.1, 0, 6)
    seen = []
    for i, look in enumerate([good, bad, Look(0.55, 0.4, 0, 6), bad, bad], 1):
        verdict = rules.assess(look, 5 * i, strikes, best)
        strikes, best = verdict.strikes, verdict.best
        seen.append((strikes, best, verdict.is_kept, verdict.ends))
    first = (0.6, 5)
    assert seen == [
        (0, first, True, False),
        (1, first, False, False),  # a higher reward, but out of bounds
        (0, first, False, False),
        (1, first, False, False),
        (2, first, True, True),
    ]
    assert rules.describe(verdict) == (
        "ended by the guard at iteration 25: pixel diversity is 0.1, below 0.2 (the base has 0.4); "
        "the best within the bounds is iteration 5, with a reward of 0.6 (the base has 0.5)"
    )
    assert "no iteration was within" in rules.describe(rules.assess(bad, 5, 0, None))
    assert rules.describe(rules.assess(good, 5, 0, None)).startswith(
        "iteration 5 is within the guard's"
    )
    assert rules.sentence == (
        "The guard looks every 5 iterations at 8 held-out prompts, 4 images each. Out of bounds is "
        "where pixel diversity is below 0.5 of the base's or drift in pixels is above 0.3 or "
        "aesthetic is more than 0.5 below the base's. Training ends after 2 looks in a row out of "
        "bounds; the best iteration is the one of highest reward within the bounds."
    )
    assert start_of(json.loads(json.dumps(rules.record(verdict)))) == START


# --- what is measured ----------------------------------------------------------------------------


def test_lpips_where_its_weights_are_there(monkeypatch):
    asked = GuardConfig(every=1, diversity="lpips_diversity")
    with pytest.raises(ConfigError, match=r"guard.diversity is 'lpips_diversity'"):
        monkeypatch.setattr(guard_measures, "Lpips", unavailable)
        Measures.of(asked)
    network = SimpleNamespace(modules=list, diversity=lambda images: float(len(images)))
    monkeypatch.setattr(guard_measures, "Lpips", lambda: network)
    measures = Measures.of(asked)
    measures.place(torch.device("cpu"), is_lent=False)
    groups = torch.zeros(6, 3, 16, 16, dtype=torch.uint8).split([2, 4])
    assert measures.spread(groups) == 3.0
    assert Measures.of(GuardConfig()) is None


def unavailable():
    raise RewardUnavailable("the weights are not here; get them")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"every": 1, "prompts": 17}, ["guard.prompts is 17", "run.eval_prompts (16)", "lower"]),
        ({"reward": "aesthetic"}, ["guard.every is 0", "leave the reward out"]),
        ({"every": 1, "max_fall": 1}, ["guard.reward names none"]),
        ({"every": 1, "reward_options": ["a=1"]}, ["guard.reward names none"]),
        ({"every": 1, "reward": "colour", "reward_options": ["x"]}, ["'x'", "OPTION=VALUE"]),
        ({"every": 1, "reward": "scene"}, ["'scene', which is trained on", "name another"]),
        ({"every": 1, "images": 1}, ["guard.images is 1"]),
        ({"every": 1, "max_fall": 0}, ["guard.max_fall is 0"]),
        ({"every": 1, "min_diversity": 1.1}, ["guard.min_diversity is 1.1"]),
        ({"every": 1, "patience": 0}, ["guard.patience is 0"]),
        ({"every": 1, "diversity": "fid"}, ["guard.diversity is 'fid'"]),
    ],
)
def test_a_guard_that_cannot_be(guard, words):
    with pytest.raises(ConfigError) as caught:
        validate({"guard": guard}, "a test")
    assert all(word in str(caught.value) for word in words)


def test_small_images_have_no_ssim():
    with pytest.raises(ConfigError, match="needs images of 11 pixels"):
        validate(
            {"guard": {"every": 1, "diversity": "ssim_diversity"}, "model": {"height": 8}}, "a test"
        )


def test_a_second_reward_may_be_the_same_with_other_options():
    options = ["quality=50", "text=plain"]
    config = validate(
        {
            "rewards": {"jpeg_compressibility": 1.0},
            "guard": {"every": 1, "reward": "jpeg_compressibility", "reward_options": options},
        },
        "a test",
    )
    assert config.guard.options == {"quality": 50, "text": "plain"}
    with pytest.raises(ConfigError, match=r"guard.reward jpeg_compressibility: "):
        Measures.of(config.guard)  # it has no option of this name


def test_a_second_reward_that_is_not_there():
    config = validate({"guard": {"every": 1, "reward": "beauty"}}, "a test")
    with pytest.raises(
        ConfigError, match=r"guard.reward is 'beauty', which is not in this version"
    ):
        preflight(config)


def test_a_comparison_has_no_guard(tmp_path):
    config = validate({"guard": {"every": 1}}, "a test")
    asked = SimpleNamespace(config=config, out=tmp_path)
    with pytest.raises(ConfigError, match=r"guard.every is 1, but a comparison needs runs"):
        check(asked, "a test")

"""`pcpo compare`: its statistics by hand, its refusals at once, and a small one from end to end."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures.refused_fixture import LONGEST_S, refused
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.compare import runs as compare_runs
from comfyui_pcpo.trainers.compare.folder import merge_with_folder, write_setup
from comfyui_pcpo.trainers.compare.images import Probe, held_out_of
from comfyui_pcpo.trainers.compare.measures import (
    SERIES,
    bootstrap,
    crossings,
    curves_of,
    estimate,
    faster,
    first_crossing,
    median_to_target,
    pair_seeds,
    summarise,
    value_at,
)
from comfyui_pcpo.trainers.config.train_config import ConfigError, read_preset, validate
from comfyui_pcpo.trainers.evaluate.comparison import METHODS, Comparison, Member, read_setup
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.prompts import chosen_prompts
from comfyui_pcpo.trainers.report.images import load_images

# --- statistics ----------------------------------------------------------------------------------


def test_bootstrap_is_that_of_all_resamples():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    means = sorted(sum(chosen) / 5 for chosen in itertools.product(values, repeat=5))
    exact = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    assert bootstrap(values) == pytest.approx(exact, abs=0.4)  # the means lie 0.2 apart there
    assert bootstrap(values) == bootstrap(values)


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    assert bootstrap(values) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.03
    )


def test_estimate_leaves_out_what_is_not_known():
    assert estimate([None, None]) is None
    assert estimate([2.0, None]) == {"mean": 2.0, "low": None, "high": None, "seeds": 1}
    assert estimate([0.0, 1.0]) == {"mean": 0.5, "low": 0.0, "high": 1.0, "seeds": 2}


def test_a_target_is_reached_at_its_first_crossing():
    run = {"iteration": [0, 10, 20, 40], "reward": [0.2, 0.4, 0.3, 0.8]}
    assert first_crossing(run, 0.25) == pytest.approx(2.5)
    assert first_crossing(run, 0.4) == 10
    assert first_crossing(run, 0.5) == pytest.approx(28)  # 2/5 of the way from 20 to 40
    assert first_crossing(run, 0.2) == 0
    assert first_crossing(run, 0.81) is None


def test_what_is_there_at_a_crossing():
    run = {"iteration": [0, 10, 20], "diversity": [0.4, 0.3, 0.1], "drift": [0.0, None, 1.0]}
    assert value_at(run, "diversity", 15) == pytest.approx(0.2)
    assert value_at(run, "diversity", None) is None
    assert value_at(run, "drift", 15) is None


def test_runs_that_never_reach_a_target_count_as_later_than_all_others():
    # of 3 resampled from {1, 2, never}: the median is never in 7 of 27 cases, 1 in as many
    found = median_to_target([2.0, None, 1.0])
    assert found == {"median": 2.0, "low": 1.0, "high": None, "reached": 2, "seeds": 3}
    assert median_to_target([None, 4.0])["median"] is None  # between 4 and never
    assert median_to_target([None, None])["low"] is None
    single = {"median": 4.0, "low": None, "high": None, "reached": 1, "seeds": 1}
    assert median_to_target([4.0]) == single


def test_differences_are_taken_at_equal_seeds():
    found = pair_seeds({0: 0.5, 1: 0.7, 3: 9.0, 4: None}, {0: 0.6, 1: 0.5, 2: 9.0, 4: 1.0})
    assert found["mean"] == pytest.approx(0.05)
    assert (found["low"], found["high"]) == pytest.approx((-0.1, 0.2))
    assert found["seeds"] == 2
    assert pair_seeds({0: None}, {0: 1.0})["mean"] is None


def test_crossings_are_those_of_each_curve():
    curves = np.random.default_rng(0).normal(size=(40, 3, 5)).cumsum(-1)
    targets = np.random.default_rng(1).normal(size=40)
    iterations = [0, 2, 4, 7, 8]
    found = crossings(curves, iterations, targets)
    for i, seed in itertools.product(range(40), range(3)):
        run = {"iteration": iterations, "reward": curves[i, seed].tolist()}
        alone = first_crossing(run, targets[i])
        assert found[i, seed] == pytest.approx(math.inf if alone is None else alone)
    assert np.isinf(found).any() and np.isfinite(found).any() and (found == 0).any()


def test_faster_over_seeds_and_prompts():
    """Twice as fast at every seed and prompt: in every resample; and equal: in none."""
    iterations, speeds = [0, 1, 2, 3, 4], np.array([[0.9, 1.0, 1.1], [1.0, 1.2, 1.3]])
    theirs = speeds[..., None] * np.arange(5) / 8
    mine = 2 * theirs
    assert faster(mine, theirs, iterations, 0.5) == pytest.approx((1, 1), rel=1e-9)
    assert faster(theirs, theirs, iterations, 0.5) == (0, 0)
    assert faster(0 * mine, theirs, iterations, 0.5) == (-1, -1)  # it never gets there
    assert faster(mine, -theirs, iterations, 0.5) == (0, 0)  # nothing to reach
    slow = theirs / 2  # at 100% of its own rise the reference gets there at times
    low, high = faster(slow, theirs, iterations, 1.0)
    assert (low, high) == (-1, 0)


def test_rewards_of_unequal_prompts_are_those_of_their_means():
    runs = [
        {"reward": [0.5, 0.7], "scores": [[0.4, 0.6], [0.6, 0.8]]},
        {"reward": [0.5, 0.9], "scores": [[0.4, 0.6], [0.8, 1.0]]},
    ]
    assert curves_of(runs).tolist() == [[[0.4, 0.6], [0.6, 0.8]], [[0.4, 0.8], [0.6, 1.0]]]
    runs[1]["scores"] = [[0.5], [0.9]]
    assert curves_of(runs).tolist() == [[[0.5, 0.7]], [[0.5, 0.9]]]
    runs[1]["scores"] = [[0.4, 0.6], []]
    assert curves_of(runs).tolist() == [[[0.5, 0.7]], [[0.5, 0.9]]]


# --- made-up runs --------------------------------------------------------------------------------


def comparison(out: Path, **options) -> Comparison:
    """Two methods, two seeds, four iterations with an evaluation after every second."""
    values = read_preset("demo").model_dump()
    values["run"] |= {"iterations": 4, "save_every": 2, "device": "cpu"}
    plain = {"methods": ("baseline", "proportionate"), "seeds": (0, 1)}
    return Comparison(out, validate(values, "test"), **(plain | options))


def pretend(member: Member, rewards: tuple[float, float, float], diversity: float) -> None:
    """The files of a finished run: 10 s an iteration, diversity falling by 0.1 in each half."""
    folder = member.folder
    config = member.config.model_dump(mode="json")
    folder.start({"config": config, "inputs": {"model": "x"}, "versions": {"threads": 1}})
    for i, reward in enumerate(rewards):
        scores = [{"prompt": "", "reward": reward + apart} for apart in (-0.01, 0.01)]
        write_json(folder.samples / f"{2 * i:05}" / "scores.json", scores)
    measured = {"base": diversity, "pcpo_00002.safetensors": diversity - 0.1}
    measured["pcpo_00004.safetensors"] = diversity - 0.2
    kinds = ("diversity", "drift_pixels", "drift_prediction")
    write_json(member.measures, {k: dict.fromkeys(kinds, v) for k, v in measured.items()})
    for i in range(1, 5):
        line = {"iteration": i, "seconds": 10.0} | {name: i / 8 for name in SERIES}
        folder.add_metrics(line | ({"held_out": rewards[i // 2]} if i % 2 == 0 else {}))
    folder.lora.mkdir()
    (folder.lora / "pcpo_00004.safetensors").touch()
    folder.status("done")


REWARDS = {
    ("baseline", 0): (0.0, 0.2, 0.3),
    ("baseline", 1): (0.0, 0.1, 0.5),  # mean rise 0.4: targets 0.1, 0.2, 0.3, 0.4
    ("proportionate", 0): (0.0, 0.4, 0.6),
    ("proportionate", 1): (0.0, 0.2, 0.2),
}


@pytest.fixture
def made_up(tmp_path) -> Comparison:
    found = comparison(tmp_path)
    for member in found.members():
        pretend(member, REWARDS[member.method, member.seed], 0.5)
    return found


def test_summary_of_made_up_runs(made_up):
    (part,) = summarise(made_up)["comparisons"]
    assert [t["reward"] for t in part["targets"]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    baseline, other = part["methods"]["baseline"], part["methods"]["proportionate"]
    assert baseline["rise"]["mean"] == pytest.approx(0.4)
    assert other["difference"]["mean"] == pytest.approx(0)  # +0.3 and -0.3
    assert (other["difference"]["won"], other["difference"]["seeds"]) == (1, 2)
    # iterations to 0.2: 2 and 2.5 for the baseline, 1 and 2 for the other
    target, there = baseline["targets"][1], other["targets"][1]
    assert target["iterations"]["median"] == pytest.approx(2.25)
    assert there["iterations"]["median"] == pytest.approx(1.5)
    assert there["faster"]["mean"] == pytest.approx(0.5)
    assert (there["faster"]["low"], there["faster"]["high"]) == (-1, 1)  # one seed alone
    assert other["difference"]["along"]["mean"] == pytest.approx(0.075)  # (0.2, 0.1) + (0.3, -0.3)
    share = other["difference"]["share"]
    assert share["low"] == pytest.approx(-share["high"]) and share["high"] > 1
    assert there["seconds"]["median"] == pytest.approx(15)
    # diversity falls by 0.05 an iteration
    assert target["diversity"]["mean"] == pytest.approx(0.5 - 0.05 * 2.25)
    assert there["diversity_difference"]["mean"] == pytest.approx(0.05 * 0.75)
    # only one run of each reaches 0.4, at different seeds: nothing to compare
    assert [m["targets"][3]["iterations"]["reached"] for m in (baseline, other)] == [1, 1]
    assert other["targets"][3]["iterations"]["median"] is None
    assert other["targets"][3]["diversity_difference"]["seeds"] == 0
    assert baseline["clip"]["clip_fraction"] == pytest.approx(10 / 32)
    assert baseline["clip"]["log_ratio_max"] == 0.5
    assert baseline["seconds"]["total"]["mean"] == 40
    assert baseline["curve"]["mean"] == pytest.approx([0, 0.15, 0.4])


def test_report_of_made_up_runs(made_up, capsys):
    write_setup(made_up, ["--seeds", "2"])
    (made_up.members()[-1].folder.root / "status.json").unlink()  # one is not finished
    assert main(["compare", "--report-only", "--out", str(made_up.out)]) == 0
    said = capsys.readouterr().out
    assert (made_up.out / "table.md").read_text() in said
    assert "1 of the runs are not finished" in said
    assert "| proportionate | 1     | 0.6000" in said
    assert ">4" in said and "1/2" in said  # a target that not all reached
    assert "| baseline             | 0.3000 | 0.5000 |" in said
    assert "| proportionate        | 0.6000 |        |" in said
    assert (made_up.out / "compare.png").stat().st_size > 10_000

    def refuse(word):
        raise AssertionError(f"{word} in result.json")

    json.loads((made_up.out / "result.json").read_text(), parse_constant=refuse)


VERDICTS = {
    (0.8, 0.8): "- proportionate ends above the baseline, by 100% of its rise at least.",
    (0.1, 0.1): "- proportionate ends below the baseline, by",
    (0.4, 0.5): "- proportionate shows no difference from the baseline: what is excluded is a gain",
}


@pytest.mark.parametrize("ends", VERDICTS)
def test_what_a_difference_shows(tmp_path, capsys, ends):
    found = comparison(tmp_path)
    for member in found.members():
        first = 0.4 if member.method == "baseline" else ends[member.seed]
        pretend(member, (0.0, 0.1, first), 0.5)
    write_setup(found, [])
    assert main(["compare", "--report-only", "--out", str(tmp_path)]) == 0
    assert VERDICTS[ends] in capsys.readouterr().out


def test_differences_from_the_control(tmp_path, capsys):
    found = comparison(tmp_path, methods=("baseline", "baseline-drop-last", "published"))
    ends = {"baseline": 0.2, "baseline-drop-last": 0.3, "published": 0.35}
    for member in found.members():
        pretend(member, (0.0, 0.1, ends[member.method]), 0.5)
    write_setup(found, [])
    assert main(["compare", "--report-only", "--out", str(tmp_path)]) == 0
    line = "| published                | 0.0500 [0.0500, 0.0500] | 2/2 | 0.0250 [0.0250, 0.0250] |"
    assert line in capsys.readouterr().out


def test_a_baseline_that_does_not_rise_gives_no_targets(made_up):
    for member in made_up.members():
        shutil.rmtree(member.folder.root)
        pretend(member, (0.5, 0.5, 0.4), 0.5)
    found = summarise(made_up)
    assert found["comparisons"][0]["targets"] == []
    assert "did not rise" in found["notes"][0]


def test_a_run_is_finished_when_all_of_it_is_there(made_up):
    metrics, export, scores, status = (member.folder for member in made_up.members())
    assert all(member.is_finished() for member in made_up.members())
    metrics.cut_metrics(2)  # the second iteration has a held-out reward too
    (export.lora / "pcpo_00004.safetensors").unlink()
    (scores.samples / "00000" / "scores.json").unlink()
    status.status("stopped")
    assert not any(member.is_finished() for member in made_up.members())


def test_another_base_reward_is_said(made_up):
    file = made_up.members()[0].folder.samples / "00000" / "scores.json"
    write_json(file, [{"prompt": "", "reward": 0.01}])
    assert "base model's reward differs" in summarise(made_up)["notes"][0]


def test_varied_field(tmp_path, capsys):
    fields = ("method.clip_low", "method.clip_high")
    found = comparison(tmp_path, fields=fields, values=(1e-4, 1e-3))
    for member in found.members():
        assert member.config.method.clip_low == member.config.method.clip_high == member.value
        pretend(member, (0.0, 0.1, 0.2 if member.value == 1e-4 else 0.3), 0.5)
    write_setup(found, [])
    assert main(["compare", "--report-only", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "## method.clip = 0.0001" in said and "## method.clip = 0.001" in said
    assert re.search(r"\| baseline +\| 0.001 +\| 0.3000 \[.*\| 0.2000, 0.3000 \|", said)
    assert (tmp_path / "compare_vary.png").is_file()
    assert (tmp_path / "runs" / "baseline-method.clip=0.001" / "seed1").is_dir()


# --- the setup -----------------------------------------------------------------------------------


def test_methods_differ_from_each_other_in_the_method_alone(tmp_path):
    found = comparison(tmp_path, methods=tuple(METHODS))
    dumps = [member.config.model_dump() for member in found.members()[: len(METHODS)]]
    axes = {
        name: tuple(dump["method"].pop(axis) for axis in ("credit", "ratio", "objective"))
        for name, dump in zip(METHODS, dumps, strict=True)
    }
    assert axes == {
        "baseline": ("native", "density", "ppo_clip"),
        "baseline-drop-last": ("native", "density", "ppo_clip"),
        "log-objective": ("native", "density", "log_hinge"),
        "epsilon-matching": ("native", "epsilon_matching", "log_hinge"),
        "proportionate": ("proportionate", "epsilon_matching", "log_hinge"),
        "objective-only": ("objective_only", "epsilon_matching", "log_hinge"),
        "published": ("published", "epsilon_matching", "log_hinge"),
        "exact": ("exact", "epsilon_matching", "log_hinge"),
        "relative": ("relative", "epsilon_matching", "log_hinge"),
        "weighted-loss": ("weighted_loss", "density", "log_hinge"),
    }
    dropped = [dump["sampler"].pop("drop_last") for dump in dumps]
    assert dropped == [0, 3, *[0] * 8]
    assert all(dump == dumps[0] for dump in dumps)


def test_target_weight_is_of_the_methods_that_have_one(tmp_path):
    values = read_preset("demo").model_dump()
    values["method"]["target_weight"] = 0.7
    found = Comparison(tmp_path, validate(values, "test"), tuple(METHODS), (0,))
    weights = {member.method: member.config.method.target_weight for member in found.members()}
    native = {"baseline", "baseline-drop-last", "log-objective", "epsilon-matching"}
    assert weights == {name: None if name in native else 0.7 for name in METHODS}


def test_seeds_and_methods_are_added(tmp_path):
    write_setup(comparison(tmp_path), ["first"])
    asked = comparison(tmp_path, methods=("log-objective",), seeds=(0, 1, 2))
    whole = write_setup(merge_with_folder(asked), ["second"])
    assert whole.methods == ("baseline", "log-objective", "proportionate")
    assert whole.seeds == (0, 1, 2)
    assert read_setup(tmp_path) == whole
    assert len(whole.commands) == 2 and len(whole.machines) == 1


def test_folder_of_another_comparison_is_refused(tmp_path):
    write_setup(comparison(tmp_path), [])
    with pytest.raises(ConfigError, match=r"varies nothing, not optimizer\.lr"):
        merge_with_folder(comparison(tmp_path, fields=("optimizer.lr",), values=(1e-3,)))
    changed = comparison(tmp_path)
    values = changed.config.model_dump()
    values["optimizer"]["lr"] = 0.5
    values["method"]["credit"] = "proportionate"  # each method sets it itself
    other = Comparison(tmp_path, validate(values, "test"), changed.methods, changed.seeds)
    with pytest.raises(ConfigError, match=r"config: optimizer\.lr was 0\.002, is 0\.5; choose"):
        merge_with_folder(other)


REFUSED = {
    "method": (("--methods", "pcpo"), "no method 'pcpo'; choose of baseline, baseline-drop-last"),
    "seeds": (("--seeds", "0"), "--seeds is '0': Input should be greater than"),
    "no number": (("--seeds", "many"), "--seeds"),
    "jobs": (("--jobs", "0"), "--jobs is '0': Input should be greater than"),
    "preset": (("--preset", "dmeo"), "no preset 'dmeo'"),
    "field": (("--vary", "optimizer.rate", "1"), "no setting 'optimizer.rate'"),
    "section": (("--vary", "optimiser.lr", "1"), "no setting 'optimiser'"),
    "no section": (("--vary", "lr", "1"), "SECTION.FIELD, like optimizer.lr, not 'lr'"),
    "no value": (("--vary", "optimizer.lr"), "there is no value"),
    "value": (("--vary", "optimizer.lr", "1e-3", "high"), "optimizer.lr is 'high'"),
    "range": (("--vary", "optimizer.lr", "-1"), "optimizer.lr is '-1'"),
    "twice": (("--vary", "optimizer.lr", "1e-3", "0.001"), "given twice"),
    "own": (("--vary", "method.credit", "native"), "the comparison sets it itself"),
    "combination": (
        ("--vary", "sampler.noise-level", "1.5"),
        "method 'baseline' at sampler.noise_level 1.5: sampler.noise_level is 1.5; ddim allows",
    ),
    "option": (("--run.iteration", "3"), "--run.iteration"),
    "no evaluation": (("--run.eval-prompts", "0"), "run.eval_prompts is 0"),
    "no model": (("--vary", "model.source", "demo", "gone.ckpt"), "no model at gone.ckpt"),
    "out": (("--out", "file"), "file is no folder"),
    "nothing to report": (("--report-only", "--out", "gone"), "gone holds no comparison"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(tmp_path, case):
    words, said = REFUSED[case]
    (tmp_path / "file").touch()
    line, is_loaded, seconds = refused(tmp_path, "compare", *words)
    assert line.startswith("pcpo compare: ") and said in line
    assert not is_loaded
    assert seconds < LONGEST_S


# --- from end to end -----------------------------------------------------------------------------

SMALL = [
    *("--methods", "proportionate", "baseline", "--seeds", "2"),
    *("--prompts-measured", "2", "--images-measured", "2", "--run.device", "cpu"),
    *("--run.iterations", "3", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "3", "--method.selection", "all", "--run.micro-batch", "4"),
    *("--run.save-every", "2", "--run.eval-prompts", "2", "--run.eval-steps", "2"),
    *("--advantage.kind", "per_prompt", "--advantage.min-count", "3"),
]


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(out: Path) -> JobFolder:
    """The first member that is started."""
    return JobFolder(out / "runs" / "baseline" / "seed0")


class InThisProcess:
    """Instead of a process: the same command without the seconds that imports take."""

    def __init__(self, words, *, env, **options):
        assert env["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
        AcceleratorState._reset_state(reset_partial_state=True)
        self.returncode = main(words[3:])

    def poll(self):
        return self.returncode


def mixed(words, **options):
    """Processes for the first seed; the second is run here, to save time."""
    return (InThisProcess if "seed1" in words[-1] else subprocess.Popen)(words, **options)


def replace_processes(patch: pytest.MonkeyPatch, popen) -> None:
    """For the comparison's own use alone."""
    names = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    patch.setattr(compare_runs, "subprocess", SimpleNamespace(Popen=popen, **names))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison that was broken off by Ctrl-C and gone on with."""
    out = tmp_path_factory.mktemp("compare") / "out"
    words = [sys.executable, "-m", "comfyui_pcpo.trainers", "compare", *SMALL, "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not run(out).metrics():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 130
    assert "stopping 1 runs" in said
    assert run(out).state()["state"] == "stopped" and not run(out).is_held()
    with pytest.MonkeyPatch.context() as patch:
        replace_processes(patch, mixed)
        assert main(["compare", *SMALL, "--out", str(out)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def members(out: Path) -> list[Member]:
    return read_setup(out).members()


def test_what_it_writes_agrees_with_its_runs(finished):
    assert "going on after iteration" in (finished / "runs/baseline/seed0.log").read_text()
    result = json.loads((finished / "result.json").read_text())
    (part,) = result["comparisons"]
    assert list(part["methods"]) == ["baseline", "proportionate"]
    for member in members(finished):
        (found,) = (r for r in part["methods"][member.method]["runs"] if r["seed"] == member.seed)
        metrics = member.folder.metrics()
        before = member.folder.read_list("samples/00000/scores.json")
        assert found["iteration"] == [0, 2, 3]
        mean = (before[0]["reward"] + before[1]["reward"]) / 2
        assert found["reward"] == [mean, metrics[1]["held_out"], metrics[2]["held_out"]]
        assert found["seconds"] == pytest.approx(sum(line["seconds"] for line in metrics))
        assert found["clip_fraction"] == [line["clip_fraction"] for line in metrics]
        assert found["drift_pixels"][0] == 0 < found["drift_pixels"][1]
        assert found["drift_prediction"][0] == 0 < found["drift_prediction"][1]
        job = member.folder.job()["config"]
        assert job == member.config.model_dump(mode="json")
    for name in ("table.md", "compare.png", "compare.json"):
        assert (finished / name).stat().st_size > 1000
    assert "| proportionate | 2 " in (finished / "table.md").read_text()


def test_methods_share_the_base_and_the_seed(finished):
    found = members(finished)
    images = [
        [(member.folder.samples / "00000" / f"{i:03}.png").read_bytes() for i in range(2)]
        for member in found
    ]
    assert all(other == images[0] for other in images)
    asked = [
        [chosen_prompts(m.config.prompts, 100, m.config.run.seed, i) for i in range(3)]
        for m in found
    ]
    assert [(m.method, m.seed) for m in found] == [
        ("baseline", 0),
        ("proportionate", 0),
        ("baseline", 1),
        ("proportionate", 1),
    ]
    assert asked[0] == asked[1] != asked[2] == asked[3]


def test_distances_are_those_of_the_images(finished):
    """The base at the run's own held-out seeds: the same sampler gives the run's own images."""
    member = members(finished)[0]
    probe = Probe(member.config, held_out_of(member, 2), 2, lambda said: None)
    evaluation = [type(r)(r.prompt, ("evaluation", i)) for i, r in enumerate(probe.requests[::2])]
    files = [member.folder.samples / "00000" / f"{i:03}.png" for i in range(2)]
    assert torch.equal(probe.sampler(evaluation).images, load_images(files))
    images = probe.sampler(probe.requests).images.double() / 255
    pairs = [(images[0], images[1]), (images[2], images[3])]
    by_hand = sum(math.sqrt(((a - b) ** 2).mean()) for a, b in pairs) / 2
    assert probe(None)["diversity"] == pytest.approx(by_hand)
    assert probe.prediction_drift() == pytest.approx(0, abs=1e-10)
    export = member.folder.lora / "pcpo_00003.safetensors"
    kept = JobFolder(member.measures.parent).read(member.measures.name)[export.name]
    assert probe(export) == pytest.approx({k: v for k, v in kept.items() if k != "of"})
    assert 0 < kept["drift_prediction"] < 1


def times(out: Path) -> dict[str, int]:
    places = (out / "runs", out / "measures")
    return {str(f): f.stat().st_mtime_ns for p in places for f in p.rglob("*") if f.is_file()}


def test_a_second_call_runs_nothing(copy, capsys, monkeypatch):
    def refuse(*words, **options):
        raise AssertionError("a process is started")

    measured = (copy / "result.json").read_text()
    replace_processes(monkeypatch, refuse)
    before = times(copy)
    assert main(["compare", *SMALL, "--out", str(copy)]) == 0
    assert times(copy) == before
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    now = json.loads((copy / "result.json").read_text())
    assert now["comparisons"] == json.loads(measured)["comparisons"]


def cut(member: Member) -> None:
    """Take a run's last iteration away."""
    folder = member.folder
    folder.cut_metrics(2)
    shutil.rmtree(folder.checkpoints / "00003")
    (folder.lora / "pcpo_00003.safetensors").unlink()


def test_broken_runs_go_on_and_failing_ones_are_named(copy, capsys, monkeypatch):
    broken, failing = members(copy)[1], members(copy)[2]
    line, export = broken.folder.metrics()[-1], broken.folder.lora / "pcpo_00003.safetensors"
    weights = export.read_bytes()
    cut(broken)
    cut(failing)
    for state in failing.folder.checkpoints.rglob("state.json"):
        state.write_text("{")
    replace_processes(monkeypatch, InThisProcess)
    assert compare_runs.command(broken)[3:] == ["resume", str(broken.folder.root)]
    assert main(["compare", *SMALL, "--out", str(copy)]) == 1
    said = capsys.readouterr()
    assert f"failed: {failing.name}: exit code 2" in said.out
    assert "is damaged" in said.err
    assert export.read_bytes() == weights
    assert broken.folder.metrics()[-1]["held_out"] == line["held_out"]
    result = json.loads((copy / "result.json").read_text())
    methods = result["comparisons"][0]["methods"]
    assert methods["proportionate"]["seeds"] == [0, 1]
    assert methods["baseline"]["seeds"] == [0]


def test_other_configs_in_the_folder_are_refused(copy, capsys):
    before = times(copy)
    capsys.readouterr()
    assert main(["compare", *SMALL, "--optimizer.lr", "0.5", "--out", str(copy)]) == 2
    assert "optimizer.lr was 0.002, is 0.5" in capsys.readouterr().err
    job = run(copy).job()
    job["config"]["sampler"]["drop_last"] = 1
    run(copy).start(job)
    before = times(copy)
    assert main(["compare", *SMALL, "--out", str(copy)]) == 2
    assert "sampler.drop_last was 1, is 0" in capsys.readouterr().err
    assert times(copy) == before

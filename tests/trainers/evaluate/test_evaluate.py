"""`pcpo evaluate`: numbers by hand, what is missing or broken said, interrupted and resumed."""

from __future__ import annotations

import csv
import json
import math
import signal
import time
from array import array
from pathlib import Path

import comfyui_pcpo
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.sections import ModelConfig
from comfyui_pcpo.trainers.config.train_config import ConfigError, read_preset, validate
from comfyui_pcpo.trainers.evaluate.images import Model
from comfyui_pcpo.trainers.evaluate.matched import matched_sides
from comfyui_pcpo.trainers.evaluate.metrics import Measured
from comfyui_pcpo.trainers.evaluate.numbers import summarise
from comfyui_pcpo.trainers.evaluate.sides import Side, read_things
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.preflight import files_of
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.memory.low_bit import PackedLinear
from comfyui_pcpo.trainers.run.sampler import Request
from evaluation_fixture import config_of, made_up_comparison, made_up_run, picture_folder
from warm_fixture import pcpo

OFFLINE = ["--metrics", "fd_random", "pixel_diversity", "ssim_diversity"]
LORA = str(Path(comfyui_pcpo.__path__[0]) / "trainers" / "demo" / "loras" / "scene.safetensors")


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


# --- folders of images ---------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A base whose greys differ by 51 (0.2) within a prompt, and one whose differ by half of it."""
    base = picture_folder(tmp_path / "one", {"a": [0, 51], "b": [102, 153]})
    other = picture_folder(tmp_path / "two", {"a": [51, 51], "b": [102, 204]})
    return base, other


def test_numbers_by_hand(folders, tmp_path, capsys):
    one, two = folders
    out = tmp_path / "out"
    assert main(["evaluate", str(one), str(two), *OFFLINE, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    found = {side["name"]: side["metrics"] for side in result["sides"]}
    assert found["one"]["pixel_diversity"]["mean"] == pytest.approx(0.2, abs=1e-6)
    assert found["two"]["pixel_diversity"]["mean"] == pytest.approx((0 + 0.4) / 2, abs=1e-6)
    assert found["one"]["drift_pixels"]["mean"] == 0
    # of a: 0.2 and 0; of b: 0 and 0.2
    assert found["two"]["drift_pixels"]["mean"] == pytest.approx(0.1, abs=1e-6)
    apart = found["two"]["pixel_diversity"]["difference"]
    assert (apart["low"], apart["high"]) == pytest.approx((-0.2, 0.2), abs=1e-6)
    assert not result["missing"] and "scene" not in found["one"]  # there is no run
    assert result["sides"][0]["overall"]["fd_random"]["value"] == 0
    assert result["sides"][1]["overall"]["fd_random"]["value"] > 0
    assert "more than 256 images" in result["sides"][1]["overall"]["fd_random"]["note"]
    said = capsys.readouterr().out
    assert "two" in said and "(!)" in said and "cost an image" in said
    images = rows_of(out / "images.csv")
    drifts = [float(row["drift_pixels"]) for row in images if row["side"] == "two"]
    assert drifts == pytest.approx([0.2, 0, 0, 0.2], abs=1e-6)
    prompts = rows_of(out / "prompts.csv")
    assert [row["prompt"] for row in prompts] == ["a", "b", "a", "b"]


def test_what_cannot_be_had_is_listed(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PCPO_REWARDS", str(tmp_path / "none"))
    out = tmp_path / "out"
    words = [*map(str, folders), "--metrics", "aesthetic", "pixel_diversity", "--out", str(out)]
    assert main(["evaluate", *words, "--reward", "ocr"]) == 0
    missing = {
        m["name"]: m["why"] for m in json.loads((out / "result.json").read_text())["missing"]
    }
    assert "trainers rewards get aesthetic`" in missing["aesthetic"]
    assert "cannot judge the prompt 'a'" in missing["ocr"] or "rapidocr" in missing["ocr"]
    said = capsys.readouterr().out
    assert "**missing** aesthetic" in said and "**missing** ocr" in said


def test_one_broken_image_of_a_thousand_is_left_out_and_said(tmp_path, capsys):
    greys = {"a": [100 + i % 50 for i in range(1000)]}
    one = picture_folder(tmp_path / "one", greys)
    two = picture_folder(tmp_path / "two", greys)
    (two / "0007.png").write_bytes((two / "0007.png").read_bytes()[:60])
    out = tmp_path / "out"
    assert main(["evaluate", str(one), str(two), *OFFLINE, "--out", str(out)]) == 1
    side = json.loads((out / "result.json").read_text())["sides"][1]
    assert side["images"] == 999
    assert [fault["file"] for fault in side["faults"]] == [str(two / "0007.png")]
    assert side["metrics"]["drift_pixels"]["mean"] == 0  # the others keep their partners
    assert "0007.png" in capsys.readouterr().out
    rows = [row for row in rows_of(out / "images.csv") if row["side"] == "two"]
    assert [i for i, row in enumerate(rows) if row["drift_pixels"] == ""] == [7]


def test_the_page_holds_prompts_as_they_are(tmp_path):
    prompt = "</script><b>{{charts}} & \u2028"
    one = picture_folder(tmp_path / "one", {prompt: [1, 2]})
    two = picture_folder(tmp_path / "two", {prompt: [3, 4]})
    out = tmp_path / "out"
    main(["evaluate", str(one), str(two), *OFFLINE, "--out", str(out)])
    page = (out / "report.html").read_text(encoding="utf-8")
    inside = page.split('id="data">')[1].split("</script>")[0]
    data = json.loads(inside)
    assert data["rows"][0]["prompt"] == prompt
    assert {len(some) for some in data["rows"][0]["images"].values()} == {2}
    assert "https:" not in page and "default-src 'none'" in page


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", ["holds no image"]),
        ("sizes", ["several sizes", "16x16", "24x24"]),
        ("prompts", ["has no image of 'b'", "the prompts must be the same"]),
        ("unlisted", ["does not name 0001.png"]),
        ("nothing", ["is nothing to evaluate"]),
        ("twice", ["two things are called 'one'"]),
        ("metric", ["there is no metric 'fdi'", "fd_random"]),
        ("reward", ["--at-reward is for --matched"]),
        ("match", ["one is none"]),
        ("methods", ["no run is of the method 'dpo'"]),
    ],
)
def test_refused_in_one_sentence(folders, tmp_path, capsys, case, words):
    one, two = folders
    things = [str(one), str(two)]
    if case == "empty":
        things[1] = str(tmp_path / "none")
        (tmp_path / "none").mkdir()
    elif case == "sizes":
        picture_folder(tmp_path / "big", {"a": [1]}, side=24)
        (tmp_path / "big" / "0000.png").replace(two / "0003.png")
    elif case == "prompts":
        things[1] = str(picture_folder(tmp_path / "other", {"a": [1, 2]}))
    elif case == "unlisted":
        (two / "prompts.json").write_text(json.dumps({"0000.png": "a"}))
    elif case == "nothing":
        things[1] = str(tmp_path / "gone.safetensors")
    elif case == "twice":
        things[1] = f"one={two}"
    more = {
        "metric": ["--metrics", "fdi"],
        "reward": ["--at-reward", "0.5"],
        "match": ["--matched"],
        "methods": ["--methods", "dpo"],
    }.get(case, [])
    out = tmp_path / "out"
    assert main(["evaluate", *things, *more, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.count("\n") == 1 and not (out / "result.json").exists()


# --- models --------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", f"tuned={LORA}", "--limit", "2", "--count", "3", "--out", str(out)]
    command += ["--metrics", "pixel_diversity", "--batch", "4", "--device", "cpu"]
    assert main(command) == 0
    files = sorted((out / "images").glob("*/*.png"))
    assert len(files) == 12
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    first = json.loads((out / "result.json").read_text())
    gone = out / "images" / "tuned" / "00001_00001.png"
    gone.unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "sampling tuned: 1 of 6 images" in capsys.readouterr().out
    changed = [file for file in files if file.stat().st_mtime_ns != before[file][1]]
    assert changed == [gone] and gone.read_bytes() == before[gone][0]
    again = json.loads((out / "result.json").read_text())
    assert again["prompts"] == first["prompts"]
    scene = first["sides"][1]["metrics"]["scene"]["mean"]
    assert scene > first["sides"][0]["metrics"]["scene"]["mean"]  # what it was trained on
    assert main([*command, "--steps", "3"]) == 2
    assert "of another evaluation: settings" in capsys.readouterr().err.replace(
        "sampler", "settings"
    )


def test_two_processes_stopped_and_gone_on_with_make_the_same_images(tmp_path):
    words = [f"tuned={LORA}", "--limit", "2", "--count", "2", "--metrics", "pixel_diversity"]
    words += ["--batch", "2", "--device", "cpu"]
    one = ["evaluate", *words, "--out", str(tmp_path / "one")]
    two = ["evaluate", *words, "--num-processes", "2", "--out", str(tmp_path / "two")]
    stopped = pcpo(*two)
    while not list((tmp_path / "two").glob("images/*/*.json")):
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    assert stopped.communicate(timeout=120)[1] == "pcpo: stopped; the same command goes on\n"
    assert stopped.returncode == 130
    again = pcpo(*two)
    assert main(one) == 0
    assert again.communicate()[1] == "" and again.returncode == 0
    for file in (tmp_path / "one" / "images").glob("*/*.png"):
        other = tmp_path / "two" / "images" / file.parent.name / file.name
        assert other.read_bytes() == file.read_bytes()
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert results[0]["prompts"] == results[1]["prompts"]


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_is_taken_at_its_last_export_or_at_another(tmp_path):
    made_up_run(JobFolder(tmp_path / "run"), config_of(3), (0.0, 0.1, 0.3, 0.2))
    given = read_things([str(tmp_path / "run"), f"second={tmp_path / 'run'}@2"])
    last, second = given.sides
    assert (last.name, last.iteration, last.reward) == ("run", 3, 0.2)
    assert (second.name, second.iteration, second.reward) == ("second", 2, 0.3)
    assert second.path == tmp_path / "run" / "lora" / "pcpo_00002.safetensors"
    assert given.config is not None and given.config.run.iterations == 3
    with pytest.raises(ConfigError, match="no export of iteration 7; it has 1, 2, 3"):
        read_things([f"{tmp_path / 'run'}@7"])


@pytest.mark.parametrize("section", ["model", "prompts"])
def test_runs_of_different_models_or_prompts_are_refused(tmp_path, capsys, section):
    config = config_of(1)
    values = config.model_dump()
    values[section]["source"] = {"model": "other.safetensors", "prompts": "animals"}[section]
    made_up_run(JobFolder(tmp_path / "a"), config, (0.0, 0.1))
    made_up_run(JobFolder(tmp_path / "b"), validate(values, "test"), (0.0, 0.1))
    out = tmp_path / "out"
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"the runs have different {section}.source" in said and f"--{section}" in said
    assert not out.exists()


def test_runs_are_matched_at_equal_rewards(tmp_path):
    rewards = {
        ("baseline", 0): (0.0, 0.2, 0.4, 0.5),
        ("proportionate", 0): (0.0, 0.3, 0.41, 0.38),
        ("baseline", 1): (0.0, 0.1, 0.15, 0.1),
        ("proportionate", 1): (0.0, 0.05, 0.16, 0.6),
    }
    made_up_comparison(tmp_path / "cmp", rewards)
    given = read_things([str(tmp_path / "cmp")])
    found = {side.name: side.iteration for side in matched_sides(given.sides)}
    assert found == {
        "baseline-seed0": 2,  # 0.4 is nearest to 0.41, the most that both reach
        "proportionate-seed0": 2,
        "baseline-seed1": 2,
        "proportionate-seed1": 2,
    }
    at_less = {side.name: side.iteration for side in matched_sides(given.sides, 0.1)}
    assert at_less["baseline-seed1"] == 1 and at_less["proportionate-seed0"] == 1
    assert {side.method for side in given.sides} == {"baseline", "proportionate"}
    with pytest.raises(ConfigError, match="only run of seed 1"):
        matched_sides(given.sides[:3])


# --- statistics ----------------------------------------------------------------------------------


def measured(values) -> Measured:
    """A score by prompt and image."""
    found = Measured(files=[len(row) for row in values], images=[len(row) for row in values])
    found.scores["score"] = array("d", [value for row in values for value in row])
    return found


def test_a_side_is_compared_with_the_base_at_equal_prompts():
    base = measured([[1.0, 3.0], [5.0, 5.0], [2.0, math.nan]])
    side = measured([[2.0, 4.0], [6.0, 7.0], [3.0, 5.0]])
    sides = [Side("base", "base", method="base"), Side("x", "images", method="x")]
    found = summarise(sides, {"base": base, "x": side})
    assert found["prompts"]["base"]["score"] == [2.0, 5.0, 2.0]
    apart = found["sides"][1]["metrics"]["score"]["difference"]
    assert apart["mean"] == pytest.approx((1 + 1.5 + 2) / 3)
    model = found["models"]["against_base"]["x"]["score"]
    assert model["observations"] == 11 and model["prompts"] == 3
    assert model["effects"]["method[side]"]["p_holm"] == model["effects"]["method[side]"]["p"]
    assert found["models"]["methods"] is None


def test_methods_of_several_seeds_and_batch_sizes():
    random = np.random.default_rng(3)
    prompts = random.normal(0, 2, 30)  # much more than what is looked for
    sides, table = [Side("base", "base", method="base")], {"base": measured(prompts[:, None])}
    for seed in range(3):
        for batch in (64, 128):
            for method, effect in (("pcpo", 0.5), ("baseline", 0.0)):
                name = f"{method}-{seed}-{batch}"
                more = 0.25 if batch == 128 and method == "pcpo" else 0.0
                own = prompts[:, None] + effect + more + random.normal(0, 0.3, (30, 4))
                sides.append(Side(name, "weights", None, method, seed, batch))
                table[name] = measured(own)
    found = summarise(sides, table)["models"]["methods"]
    assert found["levels"] == ["baseline", "pcpo"]  # the baseline is the reference, where it is
    effects = found["metrics"]["score"]["effects"]
    assert set(effects) == {"intercept", "method[pcpo]", "batch[128]", "method[pcpo]:batch[128]"}
    assert effects["method[pcpo]"]["value"] == pytest.approx(0.5, abs=0.07)
    assert effects["method[pcpo]:batch[128]"]["value"] == pytest.approx(0.25, abs=0.1)
    assert abs(effects["batch[128]"]["value"]) < 0.07
    apart = found["by_seed"]["score"]["differences"]["pcpo"]
    assert (apart["seeds"], apart["greater"]) == (3, 3)
    assert apart["mean"] == pytest.approx(0.5 + 0.25 / 2, abs=0.07)


# --- a packed base -------------------------------------------------------------------------------


def flow_lora(file, rank, target):
    """A LoRA of tiny-flow that changes something."""
    network = load_family(files_of(ModelConfig(source="demo-flow"))).network
    adapters.add_lora(network, rank, rank, [target], seed=rank)
    for _, layer in adapters.adapters(network):
        torch.nn.init.normal_(layer.lora_B[adapters.ADAPTER].weight, std=0.1)
    return adapters.export_lora(network, file, metadata={})


def test_a_packed_base_takes_one_lora_after_another(tmp_path):
    """Each time the images are those of a model that had no other weights before."""
    loras = flow_lora(tmp_path / "a.safetensors", 2, "to_q"), flow_lora(tmp_path / "b", 4, "to_v")
    values = read_preset("demo-flow").model_dump()
    values["model"]["base"], values["run"]["eval_steps"] = "int8", 2
    cpu, said = torch.device("cpu"), []

    def drawn(model):
        with torch.no_grad():
            return model.sampler(1)([Request(0, ("sample", 0))]).images

    def fresh():
        return Model(validate(values, "a test"), ["a red circle"], cpu, said.append)

    model, found = fresh(), []
    for file in (None, *loras, None):
        model.become(file)
        alone = fresh()
        alone.become(file)
        found.append(drawn(model))
        assert torch.equal(found[-1], drawn(alone))
        layers = [m for m in model.family.network.modules() if isinstance(m, PackedLinear)]
        assert len(layers) > 10
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert torch.equal(found[0], found[3])

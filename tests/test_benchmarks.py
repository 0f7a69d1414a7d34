"""The benchmark scripts run: on a CPU, with tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from comfyui_pcpo.registry import REWARDS


def benchmark(name):
    path = Path(__file__).parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_compute_to_a_reward_goes_on_with_the_seeds_that_are_missing(tmp_path):
    module = benchmark("to_reward")
    module.ALIKE = 2
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    small = ["prompts.per_iteration=2", "run.eval_prompts=2", "run.eval_steps=2", "sampler.steps=4"]
    words = ["--ways", "peer", "baseline", "all", "--iterations", "1", "--set", *small]
    words += ["--out", str(out), "--plot", str(picture)]
    module.main([*words, "--seeds", "1"])
    first = json.loads(out.read_text())
    module.main([*words, "--seeds", "2"])
    report = json.loads(out.read_text())
    assert report["seeds"]["0"] == first["seeds"]["0"] and len(report["seeds"]) == 2
    rows = report["table"]["ways"]
    assert (rows["peer"]["forward"], rows["peer"]["with gradient"]) == (4, 3)
    peer, ours = (report["seeds"]["0"][name]["curve"] for name in ("peer", "baseline"))
    assert ours[1]["reward"] == pytest.approx(peer[1]["reward"], abs=0.005)
    assert rows["all"]["forward"] == 1 and rows["all"]["with gradient"] == 3
    assert picture.stat().st_size > 10_000
    with pytest.raises(SystemExit, match="name another file"):
        module.main(["--ways", "peer", "--iterations", "1", "--out", str(out)])


def test_ways_are_compared_by_their_own_seeds_and_by_mean_curves():
    module = benchmark("to_reward")

    def seed(*ways):
        return {
            name: {
                "curve": [
                    {
                        "seconds": s,
                        "images": s,
                        "reward": min(1.0, rate * s),
                        "diversity": 1 - s / 40,
                    }
                    | {"drift": s / 10}
                    for s in range(0, 41, 2)
                ],
                "rows_per_image": {"forward": 1.0, "with gradient": 1.0},
            }
            for name, rate in zip(("first", "twice"), ways, strict=True)
        }

    found = module.table({"0": seed(0.025, 0.05), "1": seed(0.02, 0.04)}, ["first", "twice"])
    half = found["ways"]["twice"]["50%"]
    assert half["ratio"] == pytest.approx(0.5, abs=0.03) == half["mean"]
    assert half["mean_interval"] == pytest.approx([0.5, 0.5], abs=0.03)
    assert half["drift"] == pytest.approx(1.0, abs=0.06)
    assert half["diversity"] == pytest.approx(0.75, abs=0.02)
    assert found["ways"]["first"]["50%"]["ratio"] == 1

    never = module.table({"0": seed(0.025, 0.0)}, ["first", "twice"])["ways"]["twice"]["50%"]
    assert never["ratio"] == never["mean"] == float("inf")


def test_a_target_is_reached_between_two_evaluations():
    module = benchmark("to_reward")
    curve = [{"reward": r, "seconds": s} for r, s in ((0, 0), (0, 10), (3, 20), (3, 30), (3, 40))]
    assert module.smoothed(curve) == [0, 1, 2, 3, 3]
    assert module.reached(curve, 1.5, "seconds") == 15
    assert module.reached(curve, 4, "seconds") is None


def test_rewards_are_timed_beside_their_networks(tmp_path):
    module = benchmark("rewards_speed")
    out = tmp_path / "out.json"
    module.main([*["--tiny", "--batch", "1", "--repeats", "1", "--side", "64"], "--out", str(out)])
    report = json.loads(out.read_text())["rewards"]
    assert [row["reward"] for row in report] == list(module.NAMES)
    assert all(row["ratio"] > 0 and row["ms_per_image"] > 0 for row in report)


def test_memory_of_an_evaluation_is_told_and_does_not_grow(tmp_path):
    module = benchmark("evaluation_memory")
    out = tmp_path / "memory.json"
    module.main(["--images", "100", "1000", "--side", "128", "--out", str(out)])
    few, many = json.loads(out.read_text())
    assert (few["images"], many["images"]) == (200, 2000)
    assert few["milliseconds_an_image"] > 0
    assert many["peak_mib"] < few["peak_mib"] + 40  # the pixels alone are 84 MiB more


def test_metrics_are_timed(capsys, monkeypatch):
    module = benchmark("metrics_speed")
    monkeypatch.setitem(module.NETWORKS, "dinov2_large", module.NETWORKS["lpips_alex"])
    monkeypatch.setattr(module.Dinov2, "__call__", lambda self, images: images)
    found = module.main(["--side", "32", "--batch", "2", "--repeats", "1", "--images", "20"])
    assert all(value > 0 for value in found.values())
    assert "fid + inception score" in capsys.readouterr().out


def test_families_are_profiled_and_compared_with_an_earlier_file(tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    run = benchmark("profile_families").main
    small = ["--families", "tiny-flow", "--images", "2", "--iterations", "1"]
    run([*small, "--out", str(before)])
    numbers = json.loads(before.read_text())
    for phase in numbers["tiny-flow"]["phases"].values():
        phase["seconds"] *= 100
    numbers["tiny-flow"]["seconds"] *= 100
    before.write_text(json.dumps(numbers))
    run([*small, "--before", str(before), "--out", str(after)])
    ratio = json.loads(after.read_text())["tiny-flow"]["ratio"]
    assert 0 < ratio["all"] < 0.1
    assert 0 < ratio["update: backward"] < 0.1


def test_the_cost_of_a_method_is_measured_beside_its_baseline(tmp_path):
    out = tmp_path / "cost.json"
    benchmark("method_cost").main(["--images", "2", "--pairs", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found) == ["sd15-aesthetic", "sd35-ocr"]
    for case in found.values():
        seconds = case["seconds"]
        whole = seconds["pcpo"]["iteration"] / seconds["baseline"]["iteration"]
        assert case["ratio"]["iteration"] == pytest.approx(whole)
        assert seconds["pcpo"]["rollout"] + seconds["pcpo"]["update"] == pytest.approx(
            seconds["pcpo"]["iteration"]
        )


def test_guidance_by_loras_is_timed_against_plain_steps(tmp_path, monkeypatch):
    module = benchmark("irg_speed")
    monkeypatch.setattr(module, "HOST", "")
    monkeypatch.setattr(module.torch, "set_num_threads", lambda count: None)
    out = tmp_path / "irg.json"
    module.main(["--counts", "1", "2", "--rounds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["settings"]["counts"] == [1, 2]
    seconds, over = report["seconds"]["pcpo sample"], report["over_plain_steps"]["pcpo sample"]
    assert over.keys() == seconds.keys() - {"plain"} and len(over) == 6
    assert over["N=2"] == pytest.approx(seconds["N=2"] / (3 * seconds["plain"]))


def test_every_method_of_the_toy_trains(monkeypatch):
    path = Path(__file__).parents[1] / "docs" / "examples" / "toy_claim.py"
    spec = importlib.util.spec_from_file_location("toy_claim", path)
    toy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_claim", toy)  # where its dataclass looks itself up
    spec.loader.exec_module(toy)
    base = toy.base_model(steps=20)
    for method in toy.METHODS.values():
        first, last = toy.train(base, method, seed=0, iterations=1, rate=1e-3)
        assert 0 < first < 1 and 0 < last < 1 and first != last


def test_simulated_people_are_learnt_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(REWARDS, "entries", dict(REWARDS.entries))  # the script adds its own
    module = benchmark("taste")
    monkeypatch.setitem(sys.modules, "taste", module)  # where its rewards are found
    out, plot = tmp_path / "out.json", tmp_path / "taste.png"
    monkeypatch.setattr(module, "VOTES", 20)
    small = "--seeds 1 --people warm --flips 0 --training-flips 0 --counts 10 20 --pool 32 --each 8"
    small += " --arms votes asking --iterations 2 --prompts 2 --images 2 --held-out 2 --steps 3"
    module.main([*small.split(), "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["agreement/0/warm/0/half"]["20"]["right"] > 0.5
    asked, voted = (report[f"training/0/warm/0/{arm}"] for arm in ("asking", "votes"))
    assert asked["before"] == voted["before"] and asked["votes_taste"] >= 20
    assert asked["after"] != asked["before"]
    monkeypatch.setattr(module, "training", None)  # nothing is left to do
    module.main([*small.split(), "--out", str(out)])
    module.main(["--out", str(out), "--plot", str(plot)])
    assert plot.stat().st_size > 10_000
    assert module.table(report).count("\n") == 7

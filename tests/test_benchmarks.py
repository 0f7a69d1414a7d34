"""The benchmark scripts run: on a CPU, with tiny models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent / "benchmarks" / "flow_memory.py"
    spec = importlib.util.spec_from_file_location("flow_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("model", ["flux", "sd35"])
def test_every_base_is_measured_and_on_policy(script, tmp_path, model):
    out = tmp_path / "out.json"
    case = f"--model {model} --tiny --device cpu --side 64 --rank 4 --base same fp8 int8 nf4"
    small = "--images 2 --micro-batch 2 --steps 3 --iterations 1"
    script.main([*case.split(), *small.split(), "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["matmul_tflops"] > 0
    assert [found["base"] for found in report["cases"]] == ["same", "fp8", "int8", "nf4"]
    for found in report["cases"]:
        assert found["log_ratio_max_on_policy"] == 0
        assert {"rollout", "decode", "update", "iteration"} <= found["seconds"].keys()
        assert {"load", "rollout", "decode", "update"} <= found["peak_gib"].keys()


def test_rewards_are_timed_beside_their_networks(tmp_path):
    path = Path(__file__).parent / "benchmarks" / "rewards_speed.py"
    spec = importlib.util.spec_from_file_location("rewards_speed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "out.json"
    module.main([*["--tiny", "--batch", "1", "--repeats", "1", "--side", "64"], "--out", str(out)])
    report = json.loads(out.read_text())["rewards"]
    assert [row["reward"] for row in report] == list(module.NAMES)
    assert all(row["ratio"] > 0 and row["ms_per_image"] > 0 for row in report)


def test_memory_of_an_evaluation_is_told_and_does_not_grow(tmp_path):
    path = Path(__file__).parent / "benchmarks" / "evaluation_memory.py"
    spec = importlib.util.spec_from_file_location("evaluation_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "memory.json"
    module.main(["--images", "100", "1000", "--side", "128", "--out", str(out)])
    few, many = json.loads(out.read_text())
    assert (few["images"], many["images"]) == (200, 2000)
    assert few["milliseconds_an_image"] > 0
    assert many["peak_mib"] < few["peak_mib"] + 40  # the pixels alone are 84 MiB more


def test_metrics_are_timed(capsys, monkeypatch):
    path = Path(__file__).parent / "benchmarks" / "metrics_speed.py"
    spec = importlib.util.spec_from_file_location("metrics_speed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.NETWORKS, "dinov2_large", module.NETWORKS["lpips_alex"])
    monkeypatch.setattr(module.Dinov2, "__call__", lambda self, images: images)
    found = module.main(["--side", "32", "--batch", "2", "--repeats", "1", "--images", "20"])
    assert all(value > 0 for value in found.values())
    assert "fid + inception score" in capsys.readouterr().out

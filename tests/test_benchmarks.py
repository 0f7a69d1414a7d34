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

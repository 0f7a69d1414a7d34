"""`pcpo profile`: what is counted is what the method does, and a run without it has no watch."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.profile.watch import Operations, Watch
from comfyui_pcpo.trainers.run import phases, start
from torch.nn import functional

WINDOW = ("--method.selection", "sliding_window", "--method.window", "2")
SMALL = [
    *("--run.eval-prompts", "2", "--run.eval-steps", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "3", "--prompts.per-iteration", "2", "--run.micro-batch", "2"),
]


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_of_a_phase_are_its_own():
    clock = Clock()
    watch = Watch(torch.device("cpu"), clock)
    with watch.phase("outer"):
        clock.now += 1
        with watch.phase("inner"):
            clock.now += 10
        clock.now += 100
        with watch.phase("whole", is_whole=True), watch.phase("inner"):
            clock.now += 1000
    clock.now += 10000  # of no phase
    with watch.phase("inner"):
        clock.now += 10
    found = watch.take()
    seconds = {name: (phase.seconds, phase.calls) for name, phase in found.items()}
    assert seconds == {"outer": (101, 1), "inner": (20, 2), "whole": (1000, 1)}
    assert watch.take() == {}


def test_a_function_is_a_phase_in_a_profile_alone(monkeypatch):
    @phases.phase("count", is_whole=True)
    def count(n):
        return n and 1 + count(n - 1)

    assert count(3) == 3
    watch = Watch(torch.device("cpu"), Clock())
    monkeypatch.setattr(phases, "measure", lambda name, whole: watch.phase(name, is_whole=False))
    assert count(3) == 3 and watch.take()["count"].calls == 4
    monkeypatch.setattr(phases, "measure", lambda name, whole: watch.phase(name, is_whole=whole))
    assert count(3) == 3 and watch.take()["count"].calls == 1  # the others are parts of it


def test_the_peak_of_memory_is_told_by_phase():
    watch = Watch(torch.device("cpu"), Clock())
    with watch.phase("large"):
        torch.ones(32 << 20).sum()  # 128 MiB
        with watch.phase("small"):
            pass
    found = watch.take()
    if found["large"].peak == 0:
        pytest.skip("the peak of a process's memory can be had on Linux alone")
    assert found["large"].peak > found["small"].peak + (100 << 20)


def test_what_is_compiled_still_is_after_it_was_counted():
    class Layer(torch.nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight)

    layer, x, compiled = Layer(3, 4), torch.ones(2, 3), []
    layer.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    watch = Watch(torch.device("cpu"), Clock())
    assert watch.count_once("layer", lambda: layer(x))[1] == 2 * 2 * 3 * 4
    assert not compiled
    out, flop = watch.count_once("layer", lambda: layer(x))
    assert flop == 2 * 2 * 3 * 4 and out.equal(x @ layer.weight.T)
    assert len(compiled) == 1


def test_operations_of_products_convolutions_and_attention_are_counted():
    a, image, kernel = torch.ones(3, 4), torch.ones(1, 2, 8, 8), torch.ones(5, 2, 3, 3)
    q, k = (torch.ones(1, 2, n, 8, requires_grad=True) for n in (6, 7))
    with Operations() as seen:
        a @ a.T
        functional.conv2d(image, kernel, padding=1)
    assert seen.flop == 2 * 3 * 3 * 4 + 2 * 64 * 5 * 2 * 9
    with Operations() as forward:
        out = functional.scaled_dot_product_attention(q, k, k)
    with Operations() as backward:
        out.sum().backward()
    assert forward.flop == 2 * (2 * 2 * 6 * 7 * 8)
    assert backward.flop == 2.5 * forward.flop


@pytest.mark.parametrize(
    ("options", "branches", "reference"),
    [
        ((), 1, 0),
        (("--sampler.guidance-scale", "3", *WINDOW), 2, 0),
        (
            (
                *("--sampler.guidance-scale", "3", "--sampler.guidance-gradient", "conditional"),
                *("--method.kl-weight", "0.1"),
            ),
            2,
            3,
        ),
        (("--method.update", "one_pass", "--method.kl-weight", "0.1"), 1, 3),
    ],
)
def test_passes_are_counted(tmp_path, capsys, options, branches, reference):
    out = tmp_path / "profile.json"
    asked = ["profile", "demo", *SMALL, *options, "--iterations", "1", "--json", str(out)]
    assert main(asked) == 0
    found = json.loads(out.read_text())
    trained = 2 if "sliding_window" in options else 3
    trained = 0 if "one_pass" in options else trained
    assert found["passes"] == found["minimum"] == branches * (3 + trained + reference)
    phases = found["phases"]
    named = sum(phase["rows"] for name, phase in phases.items() if name.startswith("rollout"))
    assert named == 4 * 3 * branches
    assert phases["update: backward"]["flop"] > 0
    assert found["seconds"] == pytest.approx(sum(p["seconds"] for p in phases.values()))
    checks = () if "one_pass" in options else ("on-policy check",)
    assert {"text", "loading", *checks} == set(found["once"])
    assert {"evaluation", "decode", "reward", "optimizer"} <= set(phases)
    printed = capsys.readouterr().out
    assert "update: backward" in printed
    assert f"the method needs {found['minimum']:g}" in printed


def test_help_is_of_this_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["profile", "--help"])
    assert exit_.value.code == 0
    assert "usage: pcpo profile [CONFIG]" in capsys.readouterr().out


def test_what_is_filled_up_is_more_than_the_method_needs(tmp_path):
    out = tmp_path / "profile.json"
    wide = ["--run.micro-batch", "8", "--optimizer.updates", "1"]
    assert main(["profile", "demo", *SMALL, *wide, "--iterations", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["minimum"], found["passes"]) == (6, 10)  # 4 images as 8, their 12 pairs as 16


def test_nothing_is_measured_afterwards_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prepare = start.prepare
    assert main(["profile", "demo", *SMALL, "--iterations", "1"]) == 0
    assert start.prepare is prepare and phases.measure is None
    assert not list(tmp_path.glob("pcpo-profile-*"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["demo", "--iterations", "0"], "--iterations is '0': Input should be greater than"),
        (["demo", "--json", "/"], "--json is /, a folder; give a file"),
        (["nothing.toml"], "there is no config file nothing.toml"),
        ([], "give a config file or --preset"),
    ],
)
def test_what_cannot_be_profiled_is_refused(capsys, asked, said):
    assert main(["profile", *asked]) == 2
    assert said in capsys.readouterr().err

"""The config: refusals name field, value and remedy; its names are the method's names."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from comfyui_pcpo import pcpo
from comfyui_pcpo.pcpo import plan
from comfyui_pcpo.trainers.config import sections
from comfyui_pcpo.trainers.config import train_config as c


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (sections.Transition, pcpo.TRANSITIONS),
        (sections.Credit, pcpo.CREDITS),
        (sections.Ratio, pcpo.RATIOS),
        (sections.Objective, pcpo.OBJECTIVES),
        (sections.AdvantageKind, pcpo.ADVANTAGES),
        (sections.Selection, pcpo.SELECTIONS),
        (sections.Kl, pcpo.KLS),
        (sections.MeanOver, get_args(plan.MeanOver)),
    ],
)
def test_axes_are_the_methods_tables(names, table):
    assert set(get_args(names)) == set(table)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sampler": {"steps": 0}}, ["sampler.steps", "0"]),
        ({"sampler": {"stepz": 5}}, ["sampler.stepz", "--help"]),
        ({"optimizer": {"lr": -1}}, ["optimizer.lr", "-1"]),
        ({"method": {"credit": "fair"}}, ["method.credit", "fair", "proportionate"]),
        ({"method": {"ratio": "density"}}, ["method.ratio", "method.credit", "native"]),
        (
            {"method": {"ratio": "squared_error", "credit": "native"}},
            ["squared_error", "cps", "density"],
        ),
        ({"sampler": {"noise_level": 1.5}}, ["noise_level", "1.5", "at most 1"]),
        (
            {"sampler": {"noise_level": 0.5}, "method": {"credit": "exact"}},
            ["noise_level", "0.5", "objective_only"],
        ),
        (
            {"sampler": {"transition": "flow_sde"}, "method": {"credit": "published"}},
            ["method.credit", "'published'", "'flow_sde'", "'proportionate'"],
        ),
        (
            {"method": {"credit": "objective_only", "solve_weight": 4.5}},
            ["method.solve_weight", "4.5", "leave it out"],
        ),
        (
            {"sampler": {"transition": "flow_sde"}, "method": {"solve_weight": 4.5}},
            ["method.solve_weight", "'flow_sde'", "leave it out"],
        ),
        (
            {"method": {"credit": "weighted_loss", "update": "one_pass"}},
            ["method.credit", "'weighted_loss'", "'objective_only'", "method.update"],
        ),
        (
            {"sampler": {"transition": "flow_sde"}, "method": {"credit": "relative"}},
            ["method.credit", "'relative'", "'flow_sde'", "'proportionate'"],
        ),
        (
            {"method": {"credit": "relative"}, "trainable": {"kind": "full"}},
            ["method.credit", "'relative'", "trainable.kind", "'lora'"],
        ),
        (
            {"method": {"credit": "relative", "selection": "sliding_window"}},
            ["method.credit", "'relative'", "'sliding_window'", "'all'"],
        ),
        ({"sampler": {"steps": 4, "drop_last": 4}}, ["drop_last", "4 of 4"]),
        ({"method": {"kl": "without_interval", "kl_weight": 1}}, ["method.kl", "exact"]),
        ({"prompts": {"per_iteration": 1, "images_per_prompt": 1}}, ["updates", "2"]),
        (
            {"advantage": {"kind": "group"}, "prompts": {"images_per_prompt": 1}},
            ["advantage.kind", "images_per_prompt"],
        ),
        ({"trainable": {"kind": "full", "init_lora": "x"}}, ["init_lora", "full"]),
        (
            {
                "sampler": {"steps": 8},
                "method": {
                    "selection": "sliding_window",
                    "window_move": "fixed",
                    "window_start": 5,
                },
            },
            ["method.window_start is 5", "window of 4", "at 4 or before", "8 trained"],
        ),
        (
            {"method": {"credit": "relative", "kl_weight": 0.1, "kl_fraction": 0.5}},
            ["method.kl_fraction is 0.5", "'relative'", "every step", "to 1"],
        ),
        (
            {"trainable": {"kind": "full"}, "method": {"kl_weight": 0.1}},
            ["method.kl_weight is 0.1", "trainable.kind is 'full'", "without its adapters", "to 0"],
        ),
        ({"trainable": {"ema_every": 8}}, ["ema_every", "ema_decay is 0", "0.9"]),
        ({"trainable": {"ema_ramp": True}}, ["ema_ramp", "ema_decay is 0"]),
        (
            {"method": {"ratio": "guard", "credit": "native"}},
            ["method.ratio 'guard'", "'flow_sde'", "not 'ddim'", "density"],
        ),
        (
            {"method": {"ratio": "guard"}, "sampler": {"transition": "flow_sde"}},
            ["method.ratio is 'guard'", "method.credit", "'native'"],
        ),
        ({"run": {"storage_rounding": "after"}}, ["storage_rounding", "float32"]),
        ({"rewards": {}}, ["rewards"]),
        ({"rewards": {"scene": 0}}, ["'scene'", "weight 0", "leave it out"]),
        ({"rewards": {"scene": float("nan")}}, ["rewards.scene", "nan", "finite"]),
        ({"optimizer": {"lr": float("inf")}}, ["optimizer.lr", "inf", "finite"]),
        ({"sampler": {"noise_level": 0}}, ["noise_level is 0", "'epsilon_matching'", "above 0"]),
        (
            {"method": {"credit": "native", "target_weight": 2.0}},
            ["method.target_weight is 2.0", "'native'", "'proportionate'"],
        ),
        (
            {"sampler": {"steps": 8}, "method": {"selection": "sliding_window", "window": 9}},
            ["method.window is 9", "8 trained", "'all'"],
        ),
        (
            {
                "sampler": {"steps": 5, "drop_last": 1},
                "method": {"selection": "sliding_window", "window": 5},
            },
            ["method.window is 5", "4 trained"],
        ),
        (
            {"sampler": {"steps": 1}, "method": {"selection": "sliding_window", "window": 1}},
            ["sliding_window", "1 step", "sampler.steps"],
        ),
        (
            {"method": {"selection": "sliding_window", "window": 2, "window_stride": 3}},
            ["method.window_stride is 3", "method.window (2)", "never trained"],
        ),
        (
            {"advantage": {"kind": "per_prompt", "min_count": 33}},
            ["advantage.min_count is 33", "advantage.buffer_size (32)", "lower it"],
        ),
    ],
)
def test_refusals_name_field_value_and_remedy(values, said):
    with pytest.raises(c.ConfigError) as error:
        c.validate(values, "here")
    assert "here" in str(error.value)
    for word in said:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": {"steps": 4}, "method": {"window": 9, "window_stride": 9}},  # no window is used
        {"sampler": {"steps": 4}, "method": {"selection": "sliding_window", "window": 4}},
        {"trainable": {"kind": "full"}, "method": {"kl_weight": 0}},
        {"sampler": {"transition": "flow_sde"}, "method": {"ratio": "guard", "credit": "native"}},
        {"advantage": {"kind": "batch", "min_count": 99}},
        {"method": {"target_weight": 2.0}},
    ],
)
def test_what_can_be_run_is_not_refused(values):
    assert c.validate(values, "here")


def test_baselines_are_choices_on_the_axes():
    ddpo = {"method": {"credit": "native", "ratio": "density", "objective": "ppo_clip"}}
    assert c.validate(ddpo, "ddpo").method.objective == "ppo_clip"


@pytest.mark.parametrize("name", c.presets())
def test_presets_are_valid(name):
    assert isinstance(c.read_preset(name), c.TrainConfig)


def test_json_round_trip_and_toml(tmp_path):
    config = c.read_preset("demo")
    file = tmp_path / "job.json"
    file.write_text(config.model_dump_json())
    assert c.read_config(file) == config
    toml = tmp_path / "a.toml"
    toml.write_text("[sampler]\nsteps = 12\n")
    assert c.read_config(toml).sampler.steps == 12


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(c.ConfigError, match="no config file"):
        c.read_config(tmp_path / "none.toml")
    broken = tmp_path / "b.toml"
    broken.write_text("[sampler\n")
    with pytest.raises(c.ConfigError, match="is not TOML"):
        c.read_config(broken)
    with pytest.raises(c.ConfigError, match="no preset 'nope'; choose one of demo, demo-flow"):
        c.read_preset("nope")


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_files_that_are_not_utf8(tmp_path, suffix):
    file = tmp_path / f"latin.{suffix}"
    file.write_bytes(b"# \xe9")
    with pytest.raises(c.ConfigError, match=rf"latin\.{suffix} is not UTF-8 text \(byte 2\)"):
        c.read_config(file)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    file = tmp_path / "notepad.toml"
    file.write_text("\ufeff[sampler]\nsteps = 12\n", encoding="utf-8")
    assert c.read_config(file).sampler.steps == 12


def test_reading_a_config_does_not_import_torch():
    code = (
        "import sys, comfyui_pcpo.trainers.config.train_config, comfyui_pcpo.trainers.job.folder; "
    )
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

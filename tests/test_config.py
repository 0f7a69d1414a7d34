"""The config: refusals name field, value and remedy; its names are the method's names."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from comfyui_pcpo.pcpo import advantages, credit, objectives, ratios, selection, transitions
from comfyui_pcpo.trainers import config as c


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (c.Transition, transitions.TRANSITIONS),
        (c.Credit, credit.CREDITS),
        (c.Ratio, ratios.RATIOS),
        (c.Objective, objectives.OBJECTIVES),
        (c.AdvantageKind, advantages.ADVANTAGES),
        (c.Selection, selection.SELECTIONS),
        (c.Kl, ratios.KLS),
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
        ({"sampler": {"noise_level": 0.5}}, ["noise_level", "0.5", "objective_only"]),
        ({"sampler": {"steps": 4, "drop_last": 4}}, ["drop_last", "4 of 4"]),
        ({"method": {"kl": "without_interval", "kl_weight": 1}}, ["method.kl", "exact"]),
        ({"prompts": {"per_iteration": 1, "images_per_prompt": 1}}, ["updates", "2"]),
        (
            {"advantage": {"kind": "group"}, "prompts": {"images_per_prompt": 1}},
            ["advantage.kind", "images_per_prompt"],
        ),
        ({"trainable": {"kind": "full", "init_lora": "x"}}, ["init_lora", "full"]),
        ({"run": {"storage_rounding": "after"}}, ["storage_rounding", "float32"]),
        ({"rewards": {}}, ["rewards"]),
    ],
)
def test_refusals_name_field_value_and_remedy(values, said):
    with pytest.raises(c.ConfigError) as error:
        c.validate(values, "here")
    assert "here" in str(error.value)
    for word in said:
        assert word in str(error.value)


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
    with pytest.raises(c.ConfigError, match="no preset 'nope'"):
        c.read_preset("nope")


def test_reading_a_config_does_not_import_torch():
    code = "import sys, comfyui_pcpo.trainers.config, comfyui_pcpo.trainers.job; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The artists' presets: what they need is there, they fit, and they are quick."""

from __future__ import annotations

import re

import pytest
from comfyui_pcpo.registry import REWARDS
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config import train_config as c
from comfyui_pcpo.trainers.estimate.fit import CARDS, GIB, refusal, seconds
from comfyui_pcpo.trainers.estimate.memory import estimate
from comfyui_pcpo.trainers.job.prompts import BUILT_IN

ARTISTS = {
    "sd15-8gb": (8, 0),
    "sd15-taste": (8, 0),
    "sdxl-12gb": (12, 0),
    "sdxl-24gb": (24, 1),
    "sdxl-illustrious": (12, 0),
    "sdxl-illustrious-v": (12, 0),
    "sd35-16gb": (16, 0),
    "flux-24gb": (24, 1),
    "zimage-16gb": (16, 0),
    "klein-16gb": (16, 0),
    "sd35-16gb-fast": (16, 0),
    "flux-24gb-fast": (24, 1),
    "zimage-16gb-fast": (16, 0),
    "klein-16gb-fast": (16, 0),
}
"""Memory of the card, and which of the estimate's computers it is."""
PLANNED = ("sdxl-12gb", "sdxl-24gb", "sd35-16gb", "flux-24gb", "zimage-16gb", "klein-16gb")


@pytest.mark.parametrize("name", ARTISTS)
def test_it_runs_as_shipped_fits_its_card_and_takes_ten_minutes(name):
    config, (gib, computer) = c.read_preset(name), ARTISTS[name]
    assert set(config.rewards) <= set(REWARDS)
    assert config.prompts.source in BUILT_IN
    assert (config.trainable.kind, config.model.precision) == ("lora", "bfloat16")
    values = config.model_dump(mode="json")
    found = estimate(values, card=gib * GIB)
    assert refusal(values, found, gib * GIB) is None
    assert found.memory > 0.4 * gib * GIB  # and makes use of it
    assert 60 < seconds(found, CARDS[computer]) <= 600


@pytest.mark.parametrize("name", PLANNED)
def test_its_comment_says_what_the_estimate_says(name):
    text = (c.PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    gib, computer = ARTISTS[name]
    found = estimate(c.read_preset(name).model_dump(mode="json"), card=gib * GIB)
    memory = re.search(r"at most ([\d.]+) GiB", text)
    minutes = re.search(r"([\d.]+) minutes an iteration", text)
    assert memory is not None and minutes is not None
    assert float(memory[1]) == pytest.approx(found.memory / GIB, abs=0.1)
    assert float(minutes[1]) == pytest.approx(seconds(found, CARDS[computer]) / 60, abs=0.3)


@pytest.mark.parametrize(("rank", "side"), [(32, 512), (128, 512), (32, 720), (128, 720)])
def test_flux_fits_24_gb_at_either_rank_and_size(rank, side):
    values = c.read_preset("flux-24gb").model_dump(mode="json")
    values["trainable"]["rank"] = rank
    values["model"] |= {"width": side, "height": side}
    found = estimate(values, card=24 * GIB)
    assert refusal(values, found, 24 * GIB) is None, found.stages


@pytest.mark.parametrize("name", [name for name in ARTISTS if "sd15" not in name])
def test_it_can_be_planned_before_the_model_is_there(name, capsys):
    gib = ARTISTS[name][0]
    assert main(["train", "--preset", name, "--dry-run", "--card-gb", str(gib)]) == 0
    said = capsys.readouterr().out
    for word in ("encode", "load", "rollout", "decode", "reward", "update", "it fits"):
        assert word in said
    assert main(["train", "--preset", name, "--dry-run", "--card-gb", "6"]) == 2
    assert "the card has 6.0" in capsys.readouterr().err

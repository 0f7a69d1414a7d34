"""A config written out before `method.mean_over` keeps its meaning; a shorter one does not."""

from __future__ import annotations

from typing import Any

import pytest
from comfyui_pcpo.trainers.config.train_config import read_preset, validate, validate_stored


def written_before(**changes: Any) -> dict[str, Any]:
    values = read_preset("demo").model_dump(mode="json")
    for name in ("mean_over", "solve_weight"):
        del values["method"][name]
    values["method"] |= changes
    return values


@pytest.mark.parametrize(
    ("credit", "meant"),
    [("proportionate", "exact"), ("objective_only", "objective_only"), ("native", "native")],
)
def test_on_ddim_proportionate_was_what_is_called_exact(credit, meant):
    method = validate_stored(written_before(credit=credit), "job.json").method
    assert (method.credit, method.mean_over) == (meant, "step_set")


def test_on_flow_proportionate_stays():
    values = written_before(credit="proportionate", selection="all")
    values["sampler"] |= {"transition": "flow_sde", "noise_level": 0.7}
    assert validate_stored(values, "job.json").method.credit == "proportionate"


def test_what_is_written_now_means_what_it_says():
    config = read_preset("sd15-8gb")
    assert validate_stored(config.model_dump(mode="json"), "job.json") == config
    assert config.method.credit == "proportionate"
    short = validate({"method": {"credit": "proportionate"}}, "my.toml").method
    assert (short.credit, short.mean_over) == ("proportionate", "trained")

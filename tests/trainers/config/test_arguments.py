"""Command lines of pydantic models: what words become, and what a wrong one says."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from comfyui_pcpo.trainers.config.arguments import Arguments, Repeated, Words, parse
from comfyui_pcpo.trainers.config.run_arguments import DemoArguments, TrainArguments
from comfyui_pcpo.trainers.config.train_config import read_preset
from comfyui_pcpo.trainers.errors import ConfigError
from pydantic import Field

DEMO, FLOW = read_preset("demo"), read_preset("demo-flow")


class Some(Arguments):
    """Do something."""

    things: Words = Field(description="what to do it to")
    level: float = Field(default=0.5, ge=-1, le=100, description="100% is all")
    kind: Literal["a", "b"] | None = Field(default="a", description="which")
    side: Literal[0, 1] = 0
    more: list[str] = Field(default=[])
    each: Repeated = Field(default=[])
    is_fast: bool = False
    other: Annotated[str | None, "--named"] = None


def some(*words):
    return parse(Some, words, "pcpo some").model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("x y --level 1", {"things": ["x", "y"], "level": 1.0}),
        ("--level -1e-1 x", {"things": ["x"], "level": -0.1}),
        ("x --level=2 y", {"things": ["x", "y"], "level": 2.0}),
        ("x --kind None", {"things": ["x"], "kind": None}),
        ("x --side 1", {"things": ["x"], "side": 1}),
        ("--more a b --each c --each d", {"things": [], "more": ["a", "b"], "each": ["c", "d"]}),
        ("--each a x", {"things": ["x"], "each": ["a"]}),
        ("--is-fast", {"things": [], "is_fast": True}),
        ("--is_fast --no-is-fast", {"things": [], "is_fast": False}),
        ("--named x", {"things": [], "other": "x"}),
    ],
)
def test_words_become_values(words, values):
    assert some(*words.split()) == values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--level 101", "--level is '101': Input should be less than or equal to 100"),
        ("--level nan", "--level is 'nan': Input should be a finite number"),
        ("--kind c", "--kind is 'c': Input should be 'a' or 'b'"),
        ("--side 2", "--side is '2': Input should be 0 or 1"),
        ("--named", "argument --named: expected one argument"),
        ("--levle 1", "there is no option '--levle', which is near '--level'; "),
        ("--lev 1", "there is no option '--lev', which is near '--level'; "),
    ],
)
def test_a_wrong_word_is_named_with_what_is_allowed(words, said):
    with pytest.raises(ConfigError) as error:
        some(*words.split())
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "words", "shown"),
    [
        (Some, (), ["usage: pcpo x [THINGS] [options]", "100% is all (default: 0.5)"]),
        (TrainArguments, (), ["--sampler.steps INT", "native|proportionate|", "--no-dry-run"]),
        (TrainArguments, ("--preset", "demo"), [f"sampling steps (default: {DEMO.sampler.steps})"]),
        (
            DemoArguments,
            (),
            ["--model tiny-flow|tiny-sd", f"sampling steps (default: {FLOW.sampler.steps})"],
        ),
    ],
)
def test_the_help_shows_choices_and_the_values_of_the_preset(capsys, kind, words, shown):
    with pytest.raises(SystemExit) as stop:
        parse(kind, [*words, "--help"], "pcpo x")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert [text for text in shown if text not in said] == []


def test_a_config_is_changed_by_what_is_given_alone():
    words = [
        "--sampler.steps",
        "5",
        "--rewards",
        "colour",
        "2",
        "--reward-options",
        "colour.weight=3",
    ]
    config, name = parse(TrainArguments, ["--preset", "demo", *words], "pcpo train").read()
    assert (name, config.sampler.steps, config.optimizer.lr) == ("demo", 5, DEMO.optimizer.lr)
    assert config.reward_parts["colour"].weight == 3 and len(config.rewards) == 1
    with pytest.raises(ConfigError, match="give a config file or --preset, not both"):
        parse(TrainArguments, ["my.toml", "--preset", "demo"], "pcpo train").read()


@pytest.mark.parametrize(
    ("words", "name"),
    [((), "demo-flow"), (("--model", "tiny-sd"), "demo"), (("--preset", "sd15-8gb"), "sd15-8gb")],
)
def test_a_demo_is_a_preset(words, name):
    assert parse(DemoArguments, words, "pcpo demo").read()[1] == name

"""An addition is a class and one entry: a sampler, an objective, an advantage or a reward.

These are registered in a second copy of the pack, loaded under another name as ComfyUI does, and
taken away with it.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import comfy_api_fixture
import comfyui_pcpo
import pytest
import torch
from comfyui_pcpo import registry
from comfyui_pcpo.pcpo import ClipRange, Cps, Ddim, Terms
from comfyui_pcpo.pcpo.rewards import BatchReward, Scores
from comfyui_pcpo.trainers.config import train_config as config_of_the_pack
from PIL import Image
from sd1_fixture import write_folder

ROOT = Path(comfyui_pcpo.__path__[0])
COPY = "pack_with_additions"
USED: list[str] = []
"""Which of the additions below were called."""


@dataclass(frozen=True)
class Drizzle(Ddim):
    """A sampler of diffusion models: DDIM with half of its noise."""

    name = "drizzle"

    def __call__(self, grid):
        USED.append(self.name)
        steps = super().__call__(grid)
        return replace(steps, std=steps.std / 2)


@dataclass(frozen=True)
class Mist(Cps):
    """A sampler of flow models."""

    name = "mist"

    def __call__(self, grid):
        USED.append(self.name)
        return super().__call__(grid)


@dataclass(frozen=True)
class Plain:
    """An objective: REINFORCE, which clips nothing."""

    clip: ClipRange

    def __call__(self, log_ratio, advantages):
        USED.append("plain")
        outside = self.clip.outside(log_ratio)
        return Terms(-advantages * log_ratio, torch.zeros_like(outside), outside)


@dataclass(frozen=True)
class Rank:
    """An advantage: the place among an iteration's rewards, from -limit to limit."""

    limit: float

    def __call__(self, rewards, prompts):
        USED.append(f"rank to {self.limit:g}")
        return self.limit * torch.linspace(-1, 1, len(rewards))[rewards.argsort().argsort()]


class Redness(BatchReward):
    """How red a picture is."""

    name, bounds = "redness", (0.0, 255.0)

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def measure(self, images, prompts):
        USED.append(self.name)
        return Scores(images[:, 0].float().mean((1, 2)) + self.offset)


def register(tables) -> None:
    """All that an addition takes besides its class."""
    sampler = tables.SamplerEntry
    tables.TRANSITIONS.entries["drizzle"] = sampler(
        f"{__name__}:Drizzle", "light rain", is_flow=False, most=2
    )
    tables.TRANSITIONS.entries["mist"] = sampler(f"{__name__}:Mist", "fog")
    tables.OBJECTIVES.entries["plain"] = tables.Entry(f"{__name__}:Plain")
    tables.ADVANTAGES.entries["rank"] = tables.AdvantageEntry(f"{__name__}:Rank")
    tables.REWARDS.entries["redness"] = tables.RewardEntry(f"{__name__}:Redness", weights=5e6)


@pytest.fixture(scope="module")
def pack():
    """Imports a module of the copy."""
    spec = importlib.util.spec_from_file_location(
        COPY, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules[COPY] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[COPY])
    register(importlib.import_module(f"{COPY}.registry"))
    yield lambda name: importlib.import_module(f"{COPY}.{name}")
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{COPY}.")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model"), vae="tiny"))


@pytest.fixture(autouse=True)
def nothing_used():
    USED.clear()


NATIVE = ("--method.credit", "native", "--method.ratio", "density")
SMALL = {
    "demo": ("--model.width", "64", "--model.height", "64"),
    "demo-flow": ("--sampler.noise-level", "0.5"),
}
TRAINED = {
    "a sampler for diffusion": ("demo", *NATIVE, "--sampler.transition", "drizzle"),
    "a sampler for flow": ("demo-flow", "--sampler.transition", "mist"),
    "an objective": ("demo", "--method.objective", "plain"),
    "and one pass": ("demo", "--method.objective", "plain", "--method.update", "one_pass"),
    "an advantage": ("demo", "--advantage.kind", "rank", "--advantage.limit", "3"),
    "a reward": ("demo", "--rewards", "redness", "1", "--reward-options", "redness.offset=1"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_it_trains(pack, model, tmp_path, case):
    preset, *words = TRAINED[case]
    source = ("--model.source", model if preset == "demo" else preset, *SMALL[preset])
    short = ("--sampler.steps", "2", "--run.iterations", "1", "--run.eval-prompts", "0")
    few = ("--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2")
    given = (*source, *short, *few, "--rewards", "brightness", "1", *words)
    out = ("--out", str(tmp_path / "run"))
    assert pack("trainers.cli.command").main(["train", "--preset", preset, *out, *given]) == 0
    assert {"drizzle", "mist", "plain", "rank to 3", "redness"} & set(USED)
    (line,) = pack("trainers.job.folder").JobFolder(tmp_path / "run").metrics()
    assert line["grad_norm"] > 0 and line["log_ratio_max_on_policy"] == 0


def test_scores(pack, tmp_path):
    for red in (10, 200):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / f"{red}.png")
    file = tmp_path / "scores.csv"
    words = ("--reward", "redness", "--options", "redness.offset=1", "--csv", str(file))
    assert pack("trainers.cli.command").main(["score", str(tmp_path), *words]) == 0
    with file.open(newline="", encoding="utf-8") as opened:
        assert [float(row["score"]) for row in csv.DictReader(opened)] == [201, 11]


SETTINGS = {
    "sampler.transition": "mist",
    "method.objective": "plain",
    "advantage.kind": "rank",
}


@pytest.mark.parametrize("field", SETTINGS)
def test_a_config_and_the_command_line_know_it(pack, field, capsys):
    name, (section, inner) = SETTINGS[field], field.split(".")
    config, main = pack("trainers.config.train_config"), pack("trainers.cli.command").main
    assert getattr(getattr(config.validate({section: {inner: name}}, "it"), section), inner) == name
    with pytest.raises(config.ConfigError) as caught:
        config.validate({section: {inner: f"{name}y"}}, "it")
    assert f"{field} is '{name}y'" in str(caught.value) and f"'{name}'" in str(caught.value)
    with pytest.raises(config_of_the_pack.ConfigError):  # nothing is left
        config_of_the_pack.validate({section: {inner: name}}, "it")
    assert main(["train", "--preset", "demo", f"--{field}", f"{name}y"]) == 2
    assert re.search(rf"\b{name}\b", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["train", "--preset", "demo", "--help"])
    shown = capsys.readouterr().out.replace(" ", "")
    assert re.search(rf"[|\n]{name}[|\n]", shown)  # among the choices of its option


def test_an_unknown_reward_is_told_of_it(pack, capsys):
    main = pack("trainers.cli.command").main
    assert main(["train", "--preset", "demo", "--rewards", "rednes", "1"]) == 2
    assert ", vlm_judge, redness " in capsys.readouterr().err
    main(["rewards", "list", "redness"])
    assert "option    offset = 0.0" in capsys.readouterr().out


def test_rules_read_its_entry(pack):
    config = pack("trainers.config.train_config")
    for level, said in ((2.0, None), (2.5, "drizzle allows at most 2")):
        sampler = {"transition": "drizzle", "noise_level": level}
        try:
            found = config.validate({"sampler": sampler}, "it")
            assert found.sampler.noise_level == level and said is None
        except config.ConfigError as error:
            assert said in str(error)
    check = pack("trainers.job.preflight").check_family
    with pytest.raises(config.ConfigError, match="'ddim' or 'drizzle'"):
        check(config.validate({"sampler": {"transition": "mist"}}, "it"), "sd1")
    without = pack("trainers.config.effects").without_effect
    values = {"advantage": {"kind": "rank", "buffer_size": 9}, "sampler": {"transition": "mist"}}
    said = without(config.validate(values, "it"))
    assert said == ["advantage.buffer_size is 9 and has no effect: advantage.kind is 'rank'"]
    run = config.read_preset("demo").model_copy(update={"rewards": {"redness": 1.0}})
    stages = pack("trainers.estimate.memory").estimate(run.model_dump(mode="json")).stages
    assert {s.name: s.parts for s in stages}["reward"]["rewards"] == 20e6


def test_pcpo_weights_shows_its_weights(pack, tmp_path, capsys):
    out = ("--steps", "4", "--credit", "native", "--out", str(tmp_path / "w.png"))
    main = pack("trainers.cli.command").main
    assert main(["weights", "--family", "sd3", "--transition", "mist", *out]) == 0
    assert main(["weights", "--family", "sd1", "--transition", "drizzle", *out]) == 0
    assert main(["weights", "--family", "sd1", "--transition", "mist", *out]) == 2
    assert "use ddim or drizzle" in capsys.readouterr().err


def test_nodes_offer_it(pack):
    settings, sampling = pack("nodes.training.settings"), pack("nodes.sampling.nodes")
    widgets = {w.id: getattr(w, "options", None) for w in settings.widgets("demo-flow")}
    assert widgets["sampler_transition"] == ["dance_sde", "flow_sde", "cps", "mist"]
    assert widgets["method_objective"][-1] == "plain" and widgets["advantage_kind"][-1] == "rank"
    values = settings.values_of({"preset": "demo", "method_objective": "plain"})
    assert values["method"]["objective"] == "plain"
    choice, level = sampling.transition_input(), sampling.noise_level_input()
    assert choice.options[-2:] == ["drizzle", "mist"] and choice.tooltip.endswith(" mist: fog.")
    assert "mist 0.8)" in level.tooltip


def test_a_node_samples_with_it(pack):
    sde, flow = pack("nodes.sampling.sde"), type("Sd35", (type("CONST", (), {}),), {})()
    walk = sde.walk_of(sde.SdeSettings("mist", 0.3), flow, torch.tensor([1.0, 0.6, 0.2, 0.0]))
    assert USED == ["mist"] and walk.policy.tolist() == [True, True, False]
    with pytest.raises(pack("nodes.errors").NodeError, match="or cps or mist, or 'auto'"):
        sde.transition_of(sde.SdeSettings("drizzle"), flow)


def test_a_node_scores_with_it(pack):
    node = pack("nodes.rewards.nodes").PCPOReward
    inputs = {i.id: i for i in comfy_api_fixture.schema_of(node).inputs}
    assert inputs["reward"].options[-1] == "redness"
    (reward,) = comfy_api_fixture.run(node, reward="redness", options='{"offset": 1}').result
    assert reward.score(torch.full((1, 3, 4, 4), 7, dtype=torch.uint8), [""]).values.tolist() == [8]
    assert pack("nodes.training.rewards").judges_of(reward)[0].reward.name == "redness"


# --- what is registered --------------------------------------------------------------------------

TABLES = [name for name, table in vars(registry).items() if isinstance(table, registry.Table)]


@pytest.mark.parametrize("table", TABLES)
def test_a_thing_has_the_name_of_its_entry(table):
    for name, thing in getattr(registry, table).items():
        assert callable(thing) and getattr(thing, "name", name) == name


def test_entries_say_what_the_classes_say():
    for name, entry in registry.TRANSITIONS.entries.items():
        (level,) = fields(registry.TRANSITIONS[name])
        assert 0 < level.default <= entry.most
    for name, entry in registry.ADVANTAGES.entries.items():
        settings = {field.name for field in fields(registry.ADVANTAGES[name]) if field.init}
        assert settings - {"limit", "offset", "_seen"} == set(entry.reads)
    for name, entry in registry.REWARDS.entries.items():
        assert registry.REWARDS[name].is_elsewhere == entry.is_elsewhere


@pytest.mark.parametrize("table", [name for name in TABLES if name != "REWARDS"])
def test_the_help_page_of_the_settings_lists_it(table):
    page = (ROOT / "nodes" / "web" / "docs" / "PCPOTrainingSettings.md").read_text("utf-8")
    names = ", ".join(f"*{name}*" for name in getattr(registry, table))
    assert f" One of {names}. |" in page


LISTED = {
    "sampler.transition": registry.samplers(is_flow=True),
    "method.objective": registry.OBJECTIVES,
    "method.kl": registry.KLS,
    "advantage.kind": registry.ADVANTAGES,
}


@pytest.mark.parametrize("field", LISTED)
def test_the_page_of_the_method_has_its_formula(field):
    page = (ROOT / "docs" / "METHOD.md").read_text("utf-8")
    rows = page.split(f"\n| `{field}` |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)) == sorted(LISTED[field])


def test_the_page_of_the_rewards_lists_them():
    page = (ROOT / "docs" / "rewards.md").read_text("utf-8")
    cells = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(registry.REWARDS)

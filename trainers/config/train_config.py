"""One validated, serialisable description of a run. No torch: ComfyUI's process reads it too.

A method is a choice on independent axes (sampler, credit, ratio, objective, advantage, selection,
KL); `refusals` names the combinations that the mathematics does not allow. TOML files, the command
line, job files and the documentation are made from these fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from ...registry import ADVANTAGES
from ...remedies import command
from ..errors import ConfigError
from ..reading import named, no_file, parse_json, parse_toml, read_text, shown
from .rules import refusals
from .sections import AdvantageConfig, RewardConfig, TrainSettings

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "tiny_sd"
DEMO_FLOW_FOLDER = DEMO_FOLDER.with_name("tiny_flow")
DEMOS = {"demo": DEMO_FOLDER, "demo-flow": DEMO_FLOW_FOLDER}
"""Names of the shipped models in `model.source`; presets of these names align them."""
PRESETS = Path(__file__).parent / "presets"
PAPER_PRESETS = (
    ("sd15-aesthetic", "ddpo"),
    ("sd15-aesthetic-batch512", "ddpo"),
    ("sd15-bertscore", "ddpo"),
    ("sd15-bertscore-batch576", "ddpo"),
    ("sd14-hpsv21-full", "dancegrpo"),
    ("flux-hpsv21", "dancegrpo"),
    ("sd15-pickscore-full", "dancegrpo"),
    ("sd35-ocr", "flowgrpo"),
    ("sd35-pickscore", "flowgrpo"),
    ("flux-hpsv21-full", "dancegrpo"),
)
"""Settings 1 to 10 of the paper; NAME-METHOD is the preset of the baseline of each."""
FORMER_NAMES = {
    f"setting{number}{old}": name + new
    for number, (name, method) in enumerate(PAPER_PRESETS, 1)
    for old, new in (("", ""), ("-baseline", f"-{method}"))
}
"""Former names of these presets, which configs, commands and workflows may still use."""
LARGEST = 1 << 20
"""Most bytes of a config file."""

SETS = ("animals", "animals_activities", "scenes", "scenes_held_out", "tags", "varied")
"""Built-in prompts, from `prompts.BUILT_IN`."""


def compares_within_prompts(advantage: AdvantageConfig, rewards: Iterable[RewardConfig]) -> bool:
    """Whether the images of a prompt are compared only with each other."""
    is_of_groups = ADVANTAGES.entries[advantage.kind].is_of_groups
    among_themselves = is_of_groups and not advantage.global_std
    return among_themselves and all(reward.normalise != "z_score" for reward in rewards)


class TrainConfig(TrainSettings):
    """A run, its fields checked together."""

    @model_validator(mode="after")
    def _compatible(self) -> TrainConfig:
        for is_refused, reason in refusals(self):
            if is_refused:
                raise ValueError(reason)
        return self


# --- files -----------------------------------------------------------------------------------


def presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def current_name(preset: Any) -> Any:
    """Today's name of a preset that is given by a former one; anything else as it is.

    >>> current_name("setting1-baseline"), current_name("demo")
    ('sd15-aesthetic-ddpo', 'demo')
    """
    return FORMER_NAMES.get(preset, preset) if isinstance(preset, str) else preset


def read_config(source: str | Path) -> TrainConfig:
    """Read a config from a TOML or JSON file.

    A TOML file may begin with `extends = "sd15-aesthetic"`: it then changes that preset, section by
    section (`rewards` is replaced as a whole). Missing fields have their defaults.

    Raises:
        ConfigError: if there is no such file, or a field is unknown or cannot have its value.
    """
    file = Path(source)
    if why := no_file(file):
        why = "" if why == "is no file" else f": it {why}"
        raise ConfigError(
            f"there is no config file {named(file)}{why}; give a .toml file or --preset NAME"
        )
    if file.suffix.lower() != ".json":
        return validate(_resolve(file, ()), file.name)
    values = parse_json(read_text(file, file.name, LARGEST), file.name)
    if file.name == "job.json" and isinstance(values, dict) and "config" in values:
        raise ConfigError(
            f"{file} is of a run; go on with it by {command('resume', file.parent)}, or write what "
            'is under "config" to a file of its own'
        )
    return validate(values, file.name)


def read_preset(name: str) -> TrainConfig:
    """Read a shipped preset, by its name or a former one."""
    name = current_name(name)
    if name not in presets():
        known = ", ".join(presets())
        raise ConfigError(f"there is no preset {shown(name)}; choose one of {known}")
    return read_config(PRESETS / f"{name}.toml")


def _resolve(file: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """A TOML file's values over those of the preset it extends.

    `ConfigError` if a file is not TOML, or `extends` names no preset or one of those `below`.
    """
    values = parse_toml(read_text(file, file.name, LARGEST), file.name)
    if "extends" not in values:
        return values
    name, chain = current_name(values.pop("extends")), (*below, file.resolve())
    if name not in presets():
        known = ", ".join(presets())
        raise ConfigError(
            f"{file.name}: extends is {shown(name)}, no preset; choose one of {known}"
        )
    base = (PRESETS / f"{name}.toml").resolve()
    if base in chain:
        raise ConfigError(f"{file.name}: extends is {name!r}, which leads back here; end the loop")
    return merge(_resolve(base, chain), values)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge sections field by field; rewards, whose names are free, as a whole."""
    merged = {**base, **changes}
    for name in (base.keys() & changes.keys()) - {"rewards"}:
        if isinstance(base[name], dict) and isinstance(changes[name], dict):
            merged[name] = {**base[name], **changes[name]}
    return merged


def validate(values: Any, where: str) -> TrainConfig:
    """Check the values of nested sections; `where` is their name in errors.

    Raises:
        ConfigError: naming every field at fault, its value and what is allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: it holds no settings; write sections with fields")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def validate_stored(values: dict[str, Any], where: str) -> TrainConfig:
    """Check a config stored with a run, possibly by an earlier version.

    Settings that the version did not know mean what it did: the first prompts of a file were both
    trained on and "held out"; w* was the mean over all steps but the last ones, whatever the
    window, and proportionate credit on ddim was what is now called exact.
    """
    prompts = values.get("prompts", {})
    if isinstance(prompts, dict) and "held_out" not in prompts:
        is_set = prompts.get("source", "scenes") in SETS
        prompts = {**prompts, "held_out": "auto" if is_set else "training"}
    method, sampler = values.get("method", {}), values.get("sampler", {})
    if isinstance(method, dict) and isinstance(sampler, dict) and "mean_over" not in method:
        method = {**method, "mean_over": "step_set"}
        if (method.get("credit"), sampler.get("transition")) == ("proportionate", "ddim"):
            method["credit"] = "exact"
    return validate({**values, "prompts": prompts, "method": method}, where)


FORMS = ("float", "constrained-float", "RewardConfig")
"""pydantic's names for the short and the long form of a reward."""


def explain(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """One line per fault: the field, the value and what is wrong with it.

    `names` has the names of fields that a user knows by others.
    """
    lines, seen = [], set[str]()
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"] if part not in FORMS)
        is_other = fault["type"] == "model_type" and field in seen
        if is_other or (fault["type"] == "float_type" and isinstance(fault["input"], dict)):
            continue  # a reward that is meant as a number is no table, and the reverse
        seen.add(field)
        field = (names or {}).get(field, field)
        message = fault["msg"].removeprefix("Value error, ")
        unknown = fault["type"] == "extra_forbidden"
        if not field:
            lines.append(message)
        elif unknown:
            lines.append(f"there is no setting {field!r}; see {command('train', '--help')}")
        else:
            is_missing = fault["type"] == "missing"
            value = "missing" if is_missing else shown(fault["input"])
            lines.append(f"{field} is {value}: {message}")
    return "\n".join(lines)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one table with dotted names.

    >>> flat({"run": {"seed": 1}, "x": 2})
    {'run.seed': 1, 'x': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def difference(before: TrainConfig, now: TrainConfig, ignored: Sequence[str] = ()) -> str:
    """Every field that differs, in words; empty if none does but those ignored."""
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    names = sorted(n for n in {*old, *new} if old.get(n) != new.get(n) and n not in ignored)
    return ", ".join(f"{n} was {old.get(n)!r}, is {new.get(n)!r}" for n in names)

"""A comparison of methods: its runs and their folders, as `pcpo compare` writes them. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.train_config import ConfigError, TrainConfig, validate, validate_stored
from ..job.folder import JobFolder
from ..job.metrics import last_lines
from ..reading import named, shown

BASELINE = {
    "method.credit": "native",
    "method.ratio": "density",
    "method.objective": "ppo_clip",
    "method.target_weight": None,
}
PCPO = {"method.ratio": "epsilon_matching", "method.objective": "log_hinge"}
KEPT_NOISE = PCPO | {"method.solve_weight": None}
CONTROL = "baseline-drop-last"
METHODS: dict[str, dict[str, Any]] = {
    "baseline": BASELINE,
    CONTROL: BASELINE | {"sampler.drop_last": 3},
    "log-objective": BASELINE | {"method.objective": "log_hinge"},
    "epsilon-matching": BASELINE | PCPO,
    "proportionate": PCPO | {"method.credit": "proportionate"},
    "objective-only": KEPT_NOISE | {"method.credit": "objective_only"},
    "published": PCPO | {"method.credit": "published"},
    "exact": KEPT_NOISE | {"method.credit": "exact"},
    "relative": KEPT_NOISE | {"method.credit": "relative"},
    "weighted-loss": KEPT_NOISE | {"method.credit": "weighted_loss", "method.ratio": "density"},
}
"""The steps from the baseline to PCPO (the paper's Figure 6), as changes of the config's fields.

"log-objective" is the paper's log-hinge, Eq. 3, on the ratio of densities (the authors' "logrho":
the plain hinge of Eq. 2 has PPO's own gradient and would be no step). "epsilon-matching" (their
"vw") is the same ratio by another way: without rounding it changes nothing, in float32 the eighth
digit. "proportionate" is PCPO in full, on DDIM the same as "published" (their "uw-sigma");
"objective-only" has its shares in the objective and leaves the sampler its noise; "exact",
"relative" (their "uw-lambda") and "weighted-loss" are DDIM's other readings (`pcpo.credit`).
"baseline-drop-last" is the control: the baseline without its last three steps, whose weights are
the largest, shows what of the gain comes from training them less. A native credit has no target
weight.
"""

LADDER = tuple(METHODS)[:6]
"""The methods compared by default."""

OWN = ("method.credit", "method.ratio", "method.objective", "run.seed")  # set by the comparison
LIMITS = {"method.clip": ("method.clip_low", "method.clip_high")}  # short for --vary
SETUP = "compare.json"


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a comparison.

    Attributes:
        method: a key of `METHODS`.
        value: of the varied field; None if nothing is varied.
        label: the folder of its method and value.
    """

    method: str
    value: Any
    seed: int
    label: str
    config: TrainConfig
    out: Path

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.label} seed {self.seed}"

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.out / "runs" / self.label / f"seed{self.seed}")

    def file(self, ending: str) -> Path:
        """A file beside its job folder: "json" is its config, "log" its output."""
        return self.folder.root.with_name(f"seed{self.seed}.{ending}")

    @property
    def measures(self) -> Path:
        """The file of its distances."""
        return self.out / "measures" / self.label / f"seed{self.seed}.json"

    def is_finished(self) -> bool:
        """Whether the run finished and all its files are there."""
        folder, count = self.folder, self.config.run.iterations
        last = last_lines(folder.metrics_file, 1)
        return (
            folder.read("status.json").get("state") == "done"
            and any(line["iteration"] == count and "held_out" in line for line in last)
            and folder.export(count).is_file()
            and bool(scores := folder.scores(0))
            and all(score["reward"] is not None for score in scores)
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods x seeds x values of one config.

    Attributes:
        out: where everything is written.
        methods: keys of `METHODS`, in its order.
        fields: the varied fields, all set to the same value; empty if nothing is varied.
        values: of those fields; one None if nothing is varied.
        prompts: held-out prompts at which diversity and drift are measured.
        images: of each of those prompts.
        machines: where its runs were made, with versions.
    """

    out: Path
    config: TrainConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    fields: tuple[str, ...] = ()
    values: tuple[Any, ...] = (None,)
    prompts: int = 16
    images: int = 4
    machines: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    commands: tuple[str, ...] = field(default=(), compare=False)

    @property
    def varied_field(self) -> str:
        """The name of the varied field; empty if nothing is varied."""
        return next((n for n, fs in LIMITS.items() if fs == self.fields), ",".join(self.fields))

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return "baseline" if "baseline" in self.methods else self.methods[0]

    def label(self, method: str, value: Any) -> str:
        """The folder of a method at a value."""
        text = f"{method}-{self.varied_field}={value}" if self.fields else method
        return re.sub(r"[^\w.+=,-]", "_", text)

    def members(self) -> list[Member]:
        """All runs, seed after seed, so that an interrupted comparison is a fair one.

        `validate` refuses an impossible config by `ConfigError`.
        """
        base = self.config.run.seed
        configs = {
            (method, value): self._config(method, value)
            for value in self.values
            for method in self.methods
        }
        return [
            Member(
                method,
                value,
                seed,
                self.label(method, value),
                config if seed == base else _with_seed(config, seed),
                self.out,
            )
            for seed in self.seeds
            for (method, value), config in configs.items()
        ]

    def _config(self, method: str, value: Any) -> TrainConfig:
        where = f"method {method!r}" + (f" at {self.varied_field} {value!r}" if self.fields else "")
        values = self.config.model_dump()
        for name, asked in {**METHODS[method], **dict.fromkeys(self.fields, value)}.items():
            section, name = name.split(".", 1)
            values.setdefault(section, {})[name] = asked
        return validate(values, where)


def _with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})


def methods_of(names: Sequence[str]) -> tuple[str, ...]:
    """The named methods in the table's order; the ladder if none is named."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"there is no method {shown(name)}; choose of {', '.join(METHODS)}")
    return tuple(name for name in METHODS if name in (names or LADDER))


def read_setup(out: Path) -> Comparison:
    """Read a folder's compare.json."""
    file = out / SETUP
    if not os.path.isfile(file):
        raise ConfigError(f"{named(out)} holds no comparison: there is no {SETUP} in it")
    found = JobFolder(out).read(SETUP)
    try:
        return Comparison(
            out,
            validate_stored(found["config"], str(file)),
            methods_of(found["methods"]),
            tuple(found["seeds"]),
            tuple(found["vary"]["fields"]),
            tuple(found["vary"]["values"]),
            found["measured"]["prompts"],
            found["measured"]["images"],
            tuple(found["machines"]),
            tuple(found["commands"]),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read; restore it or choose another --out") from error

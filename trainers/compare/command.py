"""`pcpo compare`: methods x seeds of one config, everything equal but the method.

read and check the command line, refuse what cannot be run  (folder.py)
run what is not finished, each in a process of its own      (runs.py)
sample the exports with one common sampler                  (images.py)
put numbers with intervals on what came out                 (measures.py)
write the table and the plots                               (report.py)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ..config import bounds
from ..config.arguments import parse
from ..config.bounds import Processes, Prompts
from ..config.run_arguments import ConfigArguments
from ..config.sections import TrainFields
from ..config.train_config import ConfigError, TrainConfig, explain, flat
from ..evaluate.comparison import (
    LADDER,
    LIMITS,
    METHODS,
    OWN,
    Comparison,
    Member,
    methods_of,
    read_setup,
)
from ..job.preflight import hold_folder
from ..job.worker import cores
from ..reading import check_target
from ..report.progress import Progress
from .folder import check, merge_with_folder, write_setup
from .runs import Failure, run_members


class CompareArguments(ConfigArguments):
    """Train one config, by default the preset 'demo', with several methods and seeds, and compare
    the results. The same command continues an interrupted comparison, and may add methods and
    seeds.
    """

    methods: list[str] = Field(
        default=[], description=f"of {', '.join(METHODS)}: the first {len(LADDER)}"
    )
    seeds: int = Field(
        default=5, ge=1, le=bounds.PROCESSES, description="number of seeds, from run.seed on"
    )
    vary: list[str] = Field(
        default=[],
        description="SECTION.FIELD VALUE VALUE ...: compare at each value of a field (method.clip "
        "sets both of its ends)",
    )
    out: str | None = Field(
        default=None, description="folder of the comparison; by default runs/compare-NAME"
    )
    jobs: Processes = Field(
        default=None, description="runs at a time; by default half the cores, 1 on CUDA"
    )
    prompts_measured: Prompts = Field(default=16, description="prompts for diversity and drift")
    images_measured: int = Field(
        default=4, ge=2, le=bounds.GROUP, description="images of each of them"
    )
    report_only: bool = Field(
        default=False, description="only write tables and plots of what is in --out"
    )

    @classmethod
    def usual(cls, given: Mapping[str, Any]) -> str:
        return "demo"


def main(arguments: list[str]) -> int:
    """Compare, continue a comparison, or only report on one.

    The exit status is 1 if a run failed; `ConfigError` if nothing can be run.
    """
    a = parse(CompareArguments, arguments, "pcpo compare")
    if a.report_only:
        return _report_only(a)
    asked, name = _comparison_of(a)
    whole = merge_with_folder(asked)
    members = check(asked, name)
    whole.members()  # refused now, not after the runs, where old and new cannot be combined
    say = Progress(sys.stdout).say
    jobs = a.jobs or _jobs(members)
    with hold_folder(asked.out, "compare"):
        whole = write_setup(whole, arguments)
        say(f"{len(members)} runs in {asked.out}, {jobs} at a time")
        failures = run_members(members, jobs, say)
        finished = [member for member in whole.members() if member.is_finished()]
        if finished:
            from .images import measure  # torch and the model

            measure(finished, whole.prompts, whole.images, say)
            _report(whole)
    return _end(failures)


def _comparison_of(a: CompareArguments) -> tuple[Comparison, str]:
    """The comparison of a command line, and the name of its config."""
    if a.out is not None:
        check_target(a.out, "--out", is_folder=True)
    methods = methods_of(a.methods)
    config, name = a.read()
    fields, values = varied_of(config, a.vary)
    if config.run.seed + a.seeds > bounds.SEED + 1:
        raise ConfigError(f"run.seed is {config.run.seed} and --seeds {a.seeds}; lower run.seed")
    asked = Comparison(
        out=Path("runs") / f"compare-{name}" if a.out is None else Path(a.out),
        config=config,
        methods=methods,
        seeds=tuple(range(config.run.seed, config.run.seed + a.seeds)),
        fields=fields,
        values=values,
        prompts=a.prompts_measured,
        images=a.images_measured,
    )
    return asked, "the config" if a.config else f"preset {name!r}"


def varied_of(config: TrainConfig, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Read --vary: the fields and values of a `Comparison`, each checked by itself.

    Args:
        words: SECTION.FIELD VALUE VALUE ...; may be empty.

    Raises:
        ConfigError: for an unknown field, one that the comparison sets itself, or a value that it
            cannot have.
    """
    if not words:
        return (), (None,)
    name, *texts = words
    name = name.removeprefix("--").replace("-", "_")
    fields = LIMITS.get(name, (name,))
    if not texts:
        raise ConfigError("--vary takes SECTION.FIELD VALUE VALUE ...; there is no value")
    if name in OWN:
        raise ConfigError(f"--vary {name}: the comparison sets it itself; use --methods or --seeds")
    parts = name.split(".")
    if len(parts) != 2:
        raise ConfigError(f"--vary takes SECTION.FIELD, like optimizer.lr, not {name!r}")
    values = tuple(_value(config, fields, text) for text in texts)
    if len(set(map(str, values))) < len(values):
        raise ConfigError(f"--vary {name}: a value is given twice among {', '.join(texts)}")
    return fields, values


def _value(config: TrainConfig, fields: Sequence[str], text: str) -> Any:
    """A word as a field's value: None if it says so."""
    values = config.model_dump(exclude={"rewards"})
    for name in fields:
        section, name = name.split(".", 1)
        values.setdefault(section, {})[name] = None if text.lower() == "none" else text
    try:  # fields one by one: their combinations are judged later, with each method
        checked = TrainFields.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"--vary: {explain(error)}") from error
    return flat(checked.model_dump())[fields[0]]


def _jobs(members: Sequence[Member]) -> int:
    """Concurrent runs if the user sets no number: a GPU is not shared."""
    if all(member.config.run.device == "cpu" for member in members):
        return max(1, cores() // 2)
    import torch

    return 1 if torch.cuda.is_available() else max(1, cores() // 2)


def _report_only(a: CompareArguments) -> int:
    """Write tables and plots of the runs there are."""
    if a.out is None or ConfigArguments.model_fields.keys() & a.model_fields_set:
        raise ConfigError("--report-only takes --out FOLDER, of a comparison, and nothing else")
    whole = read_setup(Path(a.out))
    if not any(member.is_finished() for member in whole.members()):
        raise ConfigError(f"no run in {a.out} is finished; there is nothing to report on")
    _report(whole)
    return 0


def _report(whole: Comparison) -> None:
    from .measures import summarise
    from .report import write_report

    result = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machines": whole.machines,
        "commands": whole.commands,
        "config": whole.config.model_dump(mode="json"),
        "measured": {"prompts": whole.prompts, "images": whole.images},
        "varied": whole.varied_field or None,
        **summarise(whole),
    }
    print(write_report(whole, result))
    print(f"table and plots in {whole.out}")


def _end(failures: Sequence[Failure]) -> int:
    for failure in failures:
        print(f"failed: {failure}")
    if failures:
        print(f"{len(failures)} runs failed; the same command tries them again")
    return 1 if failures else 0

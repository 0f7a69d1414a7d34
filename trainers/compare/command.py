"""`pcpo compare`: methods x seeds of one config, everything equal but the method.

read and check the command line, refuse what cannot be run  (folder.py)
run what is not finished, each in a process of its own      (runs.py)
sample the exports with one common sampler                  (images.py)
put numbers with intervals on what came out                 (measures.py)
write the table and the plots                               (report.py)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config import bounds
from ..config.bounds import whole
from ..config.parser import Parser
from ..config.sections import TrainFields
from ..config.train_config import ConfigError, TrainConfig, explain
from ..evaluate.comparison import (
    LADDER,
    LIMITS,
    METHODS,
    OWN,
    Comparison,
    Member,
    flat,
    methods_of,
    read_setup,
)
from ..job.preflight import held
from ..job.worker import cores
from ..reading import check_target
from ..report.progress import Progress
from .folder import check, joined, write_setup
from .runs import Failure, run_members

ConfigOf = Callable[[list[str]], tuple[TrainConfig, str, str | None]]


def main(arguments: list[str], config_of: ConfigOf) -> int:
    """Compare, continue a comparison, or only report on one.

    `config_of` reads a run's config from its part of the command line. The exit status is 1 if a
    run failed; `ConfigError` if nothing can be run.
    """
    a, rest = _parser().parse_known_args(arguments)
    if a.report_only:
        return _report_only(a, rest)
    asked, name = _asked(a, rest, config_of)
    whole = joined(asked)
    members = check(asked, name)
    whole.members()  # refused now, not after the runs, where old and new cannot be combined
    say = Progress(sys.stdout).say
    jobs = a.jobs or _jobs(members)
    with held(asked.out, "compare"):
        whole = write_setup(whole, arguments)
        say(f"{len(members)} runs in {asked.out}, {jobs} at a time")
        failures = run_members(members, jobs, say)
        finished = [member for member in whole.members() if member.is_finished()]
        if finished:
            from .images import measure  # torch and the model

            measure(finished, whole.prompts, whole.images, say)
            _report(whole)
    return _end(failures)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "pcpo compare",
        usage="pcpo compare [CONFIG.toml | --preset NAME] [options] [--SECTION.FIELD VALUE ...]",
        description="Train one config with several methods and seeds, and compare the results. The "
        "same command continues an interrupted comparison, and may add methods and "
        "seeds.",
        epilog="CONFIG, --preset (by default demo), --rewards and --SECTION.FIELD are those of"
        " the command train.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of {', '.join(METHODS)}: the first {len(LADDER)}",
    )
    add(
        "--seeds",
        type=whole(1, bounds.PROCESSES),
        default=5,
        metavar="N",
        help="number of seeds, from run.seed on; by default 5",
    )
    add(
        "--vary",
        nargs="+",
        default=[],
        metavar="WORD",
        help="SECTION.FIELD VALUE VALUE ...: compare at each value of a field (method.clip "
        "sets both of its ends)",
    )
    add("--out", metavar="FOLDER", help="folder of the comparison; by default runs/compare-NAME")
    add(
        "--jobs",
        type=whole(1, bounds.PROCESSES),
        metavar="N",
        help="runs at a time; by default half the cores, 1 on CUDA",
    )
    _add_measures(parser)
    add(
        "--report-only", action="store_true", help="only write tables and plots of what is in --out"
    )
    return parser


def _add_measures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompts, images = whole(1, bounds.PROMPTS), whole(2, bounds.GROUP)
    add(
        "--prompts-measured",
        type=prompts,
        default=16,
        metavar="N",
        help="prompts for diversity and drift; by default 16",
    )
    add(
        "--images-measured",
        type=images,
        default=4,
        metavar="N",
        help="images of each of them; by default 4",
    )


def _asked(a: argparse.Namespace, rest: list[str], config_of: ConfigOf) -> tuple[Comparison, str]:
    """The comparison of a command line, and the name of its config."""
    if a.out is not None:
        check_target(a.out, "--out", is_folder=True)
    methods = methods_of(a.methods)
    has_config = "--preset" in rest or (bool(rest) and not rest[0].startswith("-"))
    config, name, _ = config_of(rest if has_config else ["--preset", "demo", *rest])
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
    return asked, f"preset {name!r}" if not has_config or "--preset" in rest else "the config"


def varied_of(config: TrainConfig, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Read --vary: the fields and values of a `Comparison`, each checked by itself.

    Args:
        config: that is varied.
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


def _report_only(a: argparse.Namespace, rest: Sequence[str]) -> int:
    """Write tables and plots of the runs there are."""
    if a.out is None or rest:
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
        "varied": whole.varied or None,
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

"""The command `pcpo`. Each subcommand's arguments are the fields of a typed model."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ...remedies import command
from ..config.parser import Parser

if TYPE_CHECKING:
    from ..config.train_config import TrainConfig
    from ..report.progress import Progress
    from ..run.endings import Result

USAGE = (
    "pcpo train CONFIG.toml | --preset NAME  [--out FOLDER] [--num-processes N] "
    "[--dry-run [--card-gb N]] [--rewards NAME WEIGHT ...] "
    "[--reward-options NAME.OPTION=VALUE ...] "
    "[--SECTION.FIELD VALUE ...]"
)
COMMANDS = {
    "demo": "align a shipped tiny model, --model tiny-flow or tiny-sd: minutes on two cores",
    "train": "train from a config file or a preset",
    "compare": "train one config with several methods and seeds, and compare them",
    "resume": "resume a run from its last checkpoint",
    "jobs": "list, show, pause, stop or delete runs",
    "sample": "sample images from a model, with a LoRA or without",
    "evaluate": "measure quality, diversity and drift of models on equal prompts and seeds",
    "paper": "write the paper's tables and figures from comparisons and evaluations",
    "preference": "make a blind page of pairs, and count the choices made on it",
    "score": "score image files with one reward or several: table, CSV, contact sheet",
    "rewards": "list the rewards, download their weights, or serve them to other machines",
    "export": "write a run's LoRA to a file of another precision",
    "weights": "show native and proportionate weights as a table and a plot",
    "doctor": "show what is installed, which device, what is missing",
    "profile": "show where the seconds, passes and memory of a preset's iterations go",
    "bench": "measure rollout and update on this machine, with random weights",
}
DEMO_PRESETS = {"tiny-flow": "demo-flow", "tiny-sd": "demo"}
"""The preset of each `pcpo demo --model`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its arguments are the process's own if None.

    The exit status is 0, 2 if something cannot be done as asked, 130 on Ctrl-C, 141 if nobody reads
    the output any more (`pcpo ... | head`).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without our letters shows their codes
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(given)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        is_unread = isinstance(error, BrokenPipeError)
        if not is_unread and (error.errno != errno.ENOSPC or error.filename):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the rest of the buffer goes
        if is_unread:
            return 141
        print(f"pcpo: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npcpo: stopped", file=sys.stderr)
        return 130


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: pcpo COMMAND [options]; {command('COMMAND', '--help')} lists them\n")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        return 0 if given else 2
    name, *rest = given
    from ..reading import near, printable, shown

    if name not in COMMANDS:
        what = f"there is no command {shown(name)}{near(name, COMMANDS)}"
        print(f"pcpo: {what}; choose of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from ..distributed.launcher import is_first, leave, quieten
    from ..errors import UserError

    quieten()
    try:
        status = _command(name)(rest)
        leave()
        return status
    except UserError as error:  # says what to do; all others keep their traceback
        failure, text = error, str(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not error.filename:
            raise
        failure, text = error, f"{error.filename}: {error.strerror}; check the path and the disk"
    if is_first():  # of several processes
        print(f"pcpo {name}: {printable(text)}", file=sys.stderr, flush=True)
    leave(failure)
    return 2


def _command(name: str) -> Callable[[list[str]], int]:
    own = {"train": _train, "demo": _demo, "resume": _resume, "compare": _compare}
    own["profile"] = _profile
    if name in own:
        return own[name]
    if name == "jobs":
        from .jobs import main as run
    elif name == "weights":
        from .weights import main as run
    elif name == "doctor":
        from .doctor import main as run
    elif name == "bench":
        from .bench import main as run
    elif name == "score":
        from .score import main as run
    elif name == "evaluate":
        from ..evaluate.command import main as run
    elif name == "paper":
        from ..compare.paper import main as run
    elif name == "preference":
        from .preference import main as run
    elif name == "rewards":
        from .rewards import main as run
    else:
        from . import sample_export

        run = {"sample": sample_export.sample, "export": sample_export.export}[name]
    return run


def _demo(arguments: list[str]) -> int:
    parser = Parser("pcpo demo", add_help=False)
    parser.add_argument("--model", choices=list(DEMO_PRESETS), default="tiny-flow")
    known, others = parser.parse_known_args(arguments)
    return _train(["--preset", DEMO_PRESETS[known.model], *others])


def _train(arguments: list[str]) -> int:
    from ..distributed.launcher import check_devices, is_first, number_asked, start_all

    parser = Parser("pcpo train", add_help=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--card-gb")
    asked, arguments = parser.parse_known_args(arguments)
    card = None if asked.card_gb is None else _positive(asked.card_gb)
    count, arguments = number_asked(arguments)
    config, name, out = _config_of(arguments)
    if asked.dry_run or card is not None:  # a card to plan for is asked of a plan alone
        from .dry_run import dry_run

        return dry_run(config, name, card)
    folder = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}" if out is None else Path(out)
    from ..job.preflight import check_folder, preflight
    from ..run.publish import check_publish

    preflight(config, f"preset {name!r}" if "--preset" in arguments else "the config")
    if is_first():
        check_folder(folder)
        check_publish(config)
    if count > 1:
        check_devices(count, config.run.device)
        return start_all(count, ["train", *arguments, "--out", str(folder)], folder)

    def run(progress: Progress) -> Result:
        from ..run.start import train

        return train(config, folder, progress)

    return _tell(run, folder)


def _positive(text: str) -> float:
    from ..config.train_config import ConfigError
    from ..reading import shown

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(
            f"--card-gb is {shown(text)}; give the card's memory in GB, for example 24"
        )
    return value


def _resume(arguments: list[str]) -> int:
    from ..config import bounds
    from ..config.bounds import whole

    parser = Parser("pcpo resume")
    parser.add_argument("run", type=Path, help="folder of the run")
    most = whole(1, bounds.ITERATIONS)
    parser.add_argument("--iterations", type=most, help="new number of iterations in all")
    parser.add_argument("--server", type=Path, help="folder of ComfyUI's jobs, whose locks to heed")
    parser.add_argument("--num-processes", help="processes on this machine; by default 1")

    from ..distributed.launcher import check_devices, folder_of, number_asked, start_all
    from ..run.endings import preparing

    count, rest = number_asked(arguments)
    a = parser.parse_args(rest)
    folder = folder_of(a.run)
    job = folder.job()
    if count > 1:
        check_devices(count, job["config"].get("run", {}).get("device", "auto"))
        return start_all(count, ["resume", *rest], a.run)

    def run(progress: Progress) -> Result:
        from ..run.start import go_on

        return go_on(folder, progress, a.iterations, a.server)

    with folder.held(), preparing(folder):  # what cannot be resumed is refused before torch loads
        return _tell(run, a.run)


def _compare(arguments: list[str]) -> int:
    from ..compare.command import main as run

    return run(arguments, _config_of)


def _profile(arguments: list[str]) -> int:
    from ..profile.command import main as run

    return run(arguments, _config_of)


def _tell(run: Callable[[Progress], Result], folder: Path) -> int:
    """Train, and print the outcome."""
    from ..distributed.launcher import is_first
    from ..errors import Stopped
    from ..report.progress import Progress

    try:
        result = run(Progress(sys.stdout if is_first() else None))
    except Stopped as error:
        if is_first():
            print(f"{error}; go on with {command('resume', folder)}")
        return 0
    if not is_first():
        return 0
    from ..run.endings import compared

    print(
        f"{compared(result.before, result.after)}\n"
        f"LoRA    {result.export}\n"
        f"report  {result.folder / 'report' / 'report.html'}"
    )
    return 0


def _config_of(arguments: list[str]) -> tuple[TrainConfig, str, str | None]:
    """The config with the command line's changes, its name, and the folder of the run."""
    from ..config.arguments import parse
    from ..config.reward_options import with_options
    from ..config.sections import TrainFields
    from ..config.train_config import (
        ConfigError,
        TrainConfig,
        presets,
        read_config,
        read_preset,
        validate,
    )
    from ..reading import check_target

    parser = Parser("pcpo train", add_help=False)
    parser.add_argument("--preset")
    parser.add_argument("--out")
    parser.add_argument("--rewards", nargs="+")  # the names are free, which tyro cannot offer
    parser.add_argument("--reward-options", nargs="+", default=[])
    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    known, fields = parser.parse_known_args(arguments[1:] if file else arguments)
    if known.out is not None:
        check_target(known.out, "--out", is_folder=True)
    if file and known.preset:
        raise ConfigError("give a config file or --preset, not both")
    if not (file or known.preset or {"-h", "--help"} & set(fields)):
        raise ConfigError(f"give a config file or --preset NAME, one of {', '.join(presets())}")
    config = read_preset(known.preset) if known.preset else TrainConfig()
    config = read_config(file) if file else config
    start = config.model_dump()
    rewards = start.pop("rewards")
    about = f"Train from a config file or a preset: {', '.join(presets())}."
    values = parse(TrainFields, fields, USAGE, start, about).model_dump()
    rewards = _weights(known.rewards) if known.rewards else rewards
    values["rewards"] = with_options(rewards, known.reward_options)
    config = validate(values, "the command line")
    return config, known.preset or (Path(file).stem if file else "run"), known.out


def _weights(words: list[str]) -> dict[str, float]:
    """NAME WEIGHT NAME WEIGHT ... as a table."""
    from ..config.train_config import ConfigError
    from ..reading import shown

    try:
        return {n: float(w) for n, w in zip(words[::2], words[1::2], strict=True)}
    except ValueError as error:
        raise ConfigError(f"--rewards takes NAME WEIGHT pairs, not {shown(words)}") from error


if __name__ == "__main__":
    sys.exit(main())

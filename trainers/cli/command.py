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

if TYPE_CHECKING:
    from ..config.run_arguments import TrainArguments
    from ..report.progress import Progress
    from ..run.endings import Result

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
    "taste": "teach a reward your own taste: vote on pictures, fit, show what it knows",
    "score": "score image files with one reward or several: table, CSV, contact sheet",
    "rewards": "list the rewards, download their weights, or serve them to other machines",
    "export": "write a run's LoRA in another precision, or merged into a model",
    "weights": "show native and proportionate weights as a table and a plot",
    "doctor": "show what is installed, which device, what is missing",
    "profile": "show where the seconds, passes and memory of a preset's iterations go",
    "bench": "measure rollout and update on this machine, with random weights",
}


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how OpenMP's threads wait."""


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user has said how.

    Else they spin, and beside other work on the same cores they take the time that the one they
    wait for needs. Torch reads it once, when it is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its arguments are the process's own if None.

    The exit status is 0, 2 if something cannot be done as asked, 130 on Ctrl-C, 141 if nobody reads
    the output any more (`pcpo ... | head`).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    wait_passively()
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
    from ..reading import nearest_hint, printable, shown

    if name not in COMMANDS:
        what = f"there is no command {shown(name)}{nearest_hint(name, COMMANDS)}"
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
    own = {"train": _train, "demo": _demo, "resume": _resume}
    if name in own:
        return own[name]
    if name == "compare":
        from ..compare.command import main as run
    elif name == "profile":
        from ..profile.command import main as run
    elif name == "jobs":
        from .jobs import main as run
    elif name == "weights":
        from .weights import main as run
    elif name == "doctor":
        from .doctor import main as run
    elif name == "bench":
        from ..bench.command import main as run
    elif name == "score":
        from .score import main as run
    elif name == "evaluate":
        from ..evaluate.command import main as run
    elif name == "paper":
        from ..compare.paper import main as run
    elif name == "preference":
        from .preference import main as run
    elif name == "taste":
        from .taste import main as run
    elif name == "rewards":
        from .rewards import main as run
    else:
        from . import sample_export

        run = {"sample": sample_export.sample, "export": sample_export.export}[name]
    return run


def _demo(arguments: list[str]) -> int:
    from ..config.run_arguments import DemoArguments

    return _train(arguments, "demo", DemoArguments)


def _train(
    arguments: list[str], name: str = "train", kind: type[TrainArguments] | None = None
) -> int:
    from ..config.arguments import parse
    from ..config.run_arguments import TrainArguments
    from ..distributed.launcher import check_devices, is_first, processes, start_all
    from ..job.preflight import check_folder, preflight
    from ..reading import check_target

    a = parse(kind or TrainArguments, arguments, f"pcpo {name}")
    count = processes(a.num_processes)
    if a.out is not None:
        check_target(a.out, "--out", is_folder=True)
    config, called = a.read()
    if a.dry_run or a.card_gb is not None:  # a card to plan for is asked of a plan alone
        from .dry_run import dry_run

        return dry_run(config, called, a.card_gb)
    new = f"runs/{called}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(new if a.out is None else a.out)
    from ..run.publish import check_publish

    preflight(config, "the config" if a.config else f"preset {called!r}")
    if is_first():
        check_folder(folder)
        check_publish(config)
    if count > 1:
        check_devices(count, config.run.device)
        return start_all(count, [name, *arguments, "--out", str(folder)], folder)

    def run(progress: Progress) -> Result:
        from ..run.start import train

        return train(config, folder, progress)

    return _tell(run, folder)


def _resume(arguments: list[str]) -> int:
    from ..config.arguments import parse
    from ..config.run_arguments import ResumeArguments
    from ..distributed.launcher import check_devices, folder_of, processes, start_all
    from ..run.endings import preparing

    a = parse(ResumeArguments, arguments, "pcpo resume")
    count, root = processes(a.num_processes), Path(a.run)
    folder = folder_of(root)
    job = folder.job()
    if count > 1:
        check_devices(count, job["config"].get("run", {}).get("device", "auto"))
        return start_all(count, ["resume", *arguments], root)

    def run(progress: Progress) -> Result:
        from ..run.start import go_on

        return go_on(folder, progress, a.iterations, None if a.server is None else Path(a.server))

    with folder.hold(), preparing(folder):  # what cannot be resumed is refused before torch loads
        return _tell(run, root)


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
    from ..run.endings import held_out_change

    print(
        f"{held_out_change(result.before, result.after)}\n"
        f"LoRA    {result.export}\n"
        f"report  {result.folder / 'report' / 'report.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Several processes on one machine: `--num-processes N`. Torch only where it is needed.

torch's own launcher of workers starts the processes, with the variables that torchrun and
`accelerate launch` set too, so that a run cannot see which of the three started it. For several
machines, use those programs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from ...remedies import command
from ..config.train_config import ConfigError
from ..job.folder import JobFolder, Onlooker
from ..job.worker import cores

STARTER = "PCPO_STARTED_BY"
"""The parent process, if `--num-processes` started this one."""
POLL_S = 0.1
PATIENCE_S = 5.0
"""How long the first process has to say why it does not begin."""


def is_one_of_several() -> bool:
    """Whether torchrun, accelerate or `--num-processes` started this process."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """Whether this process writes: the only one of a run, or the first."""
    return not is_one_of_several() or os.environ.get("RANK", "0") == "0"


def quieten() -> None:
    """Leave libraries' warnings to the first process; they are the same in all."""
    if not is_first():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def folder_of(root: Path) -> JobFolder:
    """The folder of a run: the first process writes into it, others only read."""
    return JobFolder(root) if is_first() else Onlooker(root)


def is_orphan() -> bool:
    """Whether the process that started this one as one of several is gone (never on Windows)."""
    return STARTER in os.environ and os.getppid() != int(os.environ[STARTER])


def leave(error: Exception | None = None) -> None:
    """Let the first process report before this one of several ends, with `error` or without."""
    if not is_one_of_several():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its own end is under way, with its own status
    if error is not None and not is_first() and "torch" not in sys.modules:
        time.sleep(PATIENCE_S)  # refused before they met: as soon as one ends, all are ended
        return
    from .processes import leave as leave_others

    leave_others(error)


def processes(asked: int | None) -> int:
    """The number of processes to start, of `--num-processes`; 1 to do the work in this one.

    `ConfigError` if another program has started several already.
    """
    if asked is None or STARTER in os.environ:
        return 1
    if is_one_of_several():
        raise ConfigError(
            f"--num-processes is {asked}, but torchrun or accelerate has started the processes; "
            "give it their own option, and leave this one out"
        )
    return asked


def check_devices(count: int, device: str) -> None:
    """Refuse more processes than there are devices; a CPU takes any number.

    `device` is run.device of the config.
    """
    import torch

    there = 0 if device == "cpu" else torch.cuda.device_count()
    if count > 1 and 0 < there < count:
        raise ConfigError(
            f"--num-processes is {count}, but there are {there} CUDA devices, and each process "
            f"needs its own; use {there}, or --run.device cpu"
        )


def start_all(count: int, words: Sequence[str], root: Path, again: str | None = None) -> int:
    """Run a command of `pcpo` in several processes, and return the exit status.

    The first Ctrl-C or SIGTERM is passed on, and the run stops as one process does; a second one
    ends them all. If one fails, the others are ended too.

    Args:
        words: the command and its arguments.
        again: the command that continues it after a stop, if that is not `resume`.

    Raises:
        KeyboardInterrupt: at a second signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs, _restored_signals():
        context: Any = start_processes(
            name="pcpo",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(count), (str(Path(__file__).parents[1]), *words)),
            envs=_environments(count),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        asked = _pass_signals_on(context)
        try:
            while context.wait(timeout=0) is None:
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            context.close(getattr(signal, "SIGKILL", signal.SIGTERM), timeout=0)
            raise
        codes = [handler.proc.returncode for handler in context.subprocess_handlers.values()]
    return _status(codes, root, asked.is_set(), again)


def _environments(count: int) -> dict[int, dict[str, str]]:
    """Each process's variables: the other processes, and its share of the cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STARTER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count))),
        **({"USE_LIBUV": "0"} if os.name == "nt" else {}),  # torch for Windows is made without it
    }
    return {i: {**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)}


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Restore the signal handlers afterwards."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    kinds = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {kind: signal.getsignal(kind) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _pass_signals_on(context: Any) -> Event:
    """Pass the first signal on to all processes; a second one is `KeyboardInterrupt`."""
    asked = Event()

    def pass_on(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        if os.name == "nt":  # Ctrl-C reaches every process of a console there
            return
        for pid in context.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, pass_on)
    return asked


def _status(codes: Sequence[int], root: Path, was_asked: bool, again: str | None) -> int:
    """The exit status of all; reports the cause if the first process could not."""
    if not any(codes) or codes[0] == 2:
        return codes[0]
    folder = JobFolder(root)
    if was_asked and set(codes) <= {0, -signal.SIGTERM} and not folder.is_used():
        told = f"; {again} goes on" if again else " before it began"
        print(f"pcpo: stopped{told}", file=sys.stderr)
        return 130
    ended = [i for i, code in enumerate(codes) if code != 0]
    index = next((i for i in ended if codes[i] not in (2, -signal.SIGTERM)), ended[0])
    code = codes[index]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    text = f"process {index} of {len(codes)} {how}"
    if folder.is_used():
        text += f"; go on with {command('resume', root)}"
    if folder.is_used() and folder.state()["state"] == "lost":
        folder.status("failed", **folder.place(), message=text)
    print(f"pcpo: {text}", file=sys.stderr)
    return 2

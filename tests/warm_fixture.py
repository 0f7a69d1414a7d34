"""`pcpo` in a process of its own that begins at once: a fork of one that has imported the trainer.

So are the processes that `--num-processes` and torchrun start below it. Where nothing can be forked
(Windows) all are started as a user starts them, and take the seconds that the imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from comfyui_pcpo import trainers
from comfyui_pcpo.trainers import cli
from comfyui_pcpo.trainers.report import curves  # noqa: F401
from comfyui_pcpo.trainers.run import loop  # noqa: F401
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

TRAINERS = Path(trainers.__file__).parent
CAN_FORK = hasattr(os, "fork")
if CAN_FORK:
    _FORKS = multiprocessing.get_context("forkserver")
    _FORKS.set_forkserver_preload(["comfyui_pcpo.tests.warm_fixture"])


class Forked:
    """What the tests use of `subprocess.Popen`; what is said is text."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], cwd: str | Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name, name) for name in ("out", "err")]
        started = (list(words), dict(env), str(cwd), self._said)
        self._process = _FORKS.Process(target=_begin, args=started, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("pcpo", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text(encoding="utf-8") for file in self._said)
        return out, err

    def said(self) -> str:
        """The first line of its output, once it is there."""
        out = self._said[0]
        line = out.read_text(encoding="utf-8") if out.exists() else ""
        return line.partition("\n")[0] if "\n" in line else ""

    def send_signal(self, kind: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, kind)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Forked | subprocess.Popen[str]


def started(
    *words: str | Path, env: Mapping[str, str] | None = None, cwd: str | Path = "."
) -> Process:
    """What `python WORDS` does, begun: words are `-m MODULE ...` or `SCRIPT ...`."""
    words, env = [str(word) for word in words], os.environ | (env or {})
    if CAN_FORK:
        return Forked(words, env, Path(cwd).resolve())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *words]
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, encoding="utf-8", **pipes)


def pcpo(*words: str, **options) -> Process:
    return started("-m", "comfyui_pcpo.trainers", *words, **options)


def first_line(process: Process) -> str:
    """What it says first, as soon as it does; empty where it ends without a word."""
    if isinstance(process, subprocess.Popen):
        return process.stdout.readline()
    while not (line := process.said()) and process.poll() is None:
        time.sleep(0.02)
    return line


def _begin(words: list[str], env: dict[str, str], cwd: str, said: list[Path]) -> NoReturn:
    os.chdir(cwd)
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    with patch.object(SubprocessHandler, "_popen", _Rank):
        _become(words, env)


def _become(words: list[str], env: Mapping[str, str]) -> NoReturn:
    os.environ.clear()
    os.environ.update(env)
    while words[0] in ("-u", "-m"):
        words = words[1:]
    sys.argv = words
    if words[0] in ("comfyui_pcpo.trainers", str(TRAINERS)):
        sys.exit(cli.main(words[1:]))
    if words[0] == torchrun.__name__:
        sys.exit(torchrun.main(words[1:]))
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()


class _Rank:
    """What torch's launcher uses of `subprocess.Popen`: a fork of the process that it runs in."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.args, self.returncode = command, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for kind in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(kind, signal.SIG_DFL)
            _become([*command[1:]], env)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, kind: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, kind)

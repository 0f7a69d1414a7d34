"""Every number of a config, of an option and of a widget has ends."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import types
from typing import get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt
from comfyui_pcpo.trainers.cli.command import COMMANDS, main
from comfyui_pcpo.trainers.config import bounds
from comfyui_pcpo.trainers.config.arguments import Arguments
from comfyui_pcpo.trainers.config.sections import TrainFields
from comfyui_pcpo.trainers.config.train_config import RewardConfig, validate
from comfyui_pcpo.trainers.errors import ConfigError

MODULES = (
    "bench.command",
    "evaluate.command",
    "compare.paper",
    "cli.preference",
    "cli.score",
    "reward_server.server",
    "cli.sample_export",
    "cli.weights",
)
SECTIONS = [field.annotation for field in TrainFields.model_fields.values()]


def models() -> list[type]:
    found = [importlib.import_module(f"comfyui_pcpo.trainers.{name}") for name in MODULES]
    kinds = {k for m in found for k in vars(m).values() if isinstance(k, type)}
    arguments = [k for k in kinds if issubclass(k, Arguments) and k is not Arguments]
    return [*SECTIONS, RewardConfig, *sorted(arguments, key=lambda kind: kind.__name__)]


def numbers(model: type) -> dict[str, tuple[float, float]]:
    """The ends of each number of a model; not finite where it has none."""
    found = {}
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else ()
        if {int, float} & {*kinds, field.annotation}:
            ends = [-math.inf, math.inf]
            for mark in field.metadata:
                if isinstance(mark, Ge | Gt):
                    ends[0] = getattr(mark, "ge", getattr(mark, "gt", 0))
                elif isinstance(mark, Le | Lt):
                    ends[1] = getattr(mark, "le", getattr(mark, "lt", 0))
            found[name] = tuple(ends)
    return found


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_number_has_both_ends(model):
    for name, ends in numbers(model).items():
        assert all(map(math.isfinite, ends)), name


def test_there_are_numbers_to_check():
    assert sum(len(numbers(model)) for model in models()) > 70


@pytest.mark.parametrize("section", TrainFields.model_fields)
def test_what_is_beyond_an_end_is_refused_by_name(section):
    model = TrainFields.model_fields[section].annotation
    for name, (low, high) in numbers(model).items():
        for value in (low - 1, high * 2 + 1, 10**400):
            with pytest.raises(ConfigError, match=rf"^x: {section}\.{name} is "):
                validate({section: {name: value}}, "x")


@pytest.mark.parametrize("weight", [1e7, -1e7, math.nan, math.inf])
def test_a_weight_without_end_is_one_line(weight):
    with pytest.raises(ConfigError) as error:
        validate({"rewards": {"scene": weight}}, "x")
    assert str(error.value).startswith("x: rewards.scene is ") and "\n" not in str(error.value)


def test_an_iteration_of_too_many_images_is_refused():
    with pytest.raises(ConfigError, match=r"is 10,240,000 images an iteration"):
        validate({"prompts": {"per_iteration": 10_000, "images_per_prompt": 1024}}, "x")


def test_a_seed_of_comfyui_is_a_seed():
    assert validate({"run": {"seed": 2**64 - 1}}, "x").run.seed == bounds.SEED
    with pytest.raises(ConfigError, match="less than or equal to 18446744073709551615"):
        validate({"run": {"seed": 2**64}}, "x")


# --- options that argparse reads -----------------------------------------------------------------

OPTIONS = [
    ("compare", "--seeds"),
    ("compare", "--jobs"),
    ("compare", "--prompts-measured"),
    ("compare", "--images-measured"),
    ("profile", "--iterations"),
    ("resume", "x", "--iterations"),
    ("train", "--preset", "demo", "--num-processes"),
    ("train", "--preset", "demo", "--card-gb"),
]
ODD = ["-1", "0", "", "x", "1e9", "nan", "²", "9" * 5000, str(10**12)]


@pytest.mark.parametrize("value", ODD, ids=lambda value: value[:12])
@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_options_are_refused_in_one_line(words, value, capsys):
    assert main([*words, value]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pcpo {words[0]}: ") and said.count("\n") == 1 and len(said) < 400


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor"}))
def test_an_unknown_option_is_one_line(command, capsys):
    assert main([command, "--there-is-none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pcpo {command}: ") and said.count("\n") == 1


def test_a_command_that_is_nearly_one(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian', which is near 'train'" in capsys.readouterr().err


# --- where the output goes -----------------------------------------------------------------------

POSIX = pytest.mark.skipif(os.name == "nt", reason="a pipe of a POSIX shell")


def started(code: str, **more) -> subprocess.Popen:
    program = f"import sys; from comfyui_pcpo.trainers.cli.command import main; {code}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program], **{**streams, **more})


@POSIX
@pytest.mark.parametrize("words", [["--help"], ["rewards", "list"], ["train", "--help"]])
def test_nobody_reads_the_output(words):
    reader, writer = os.pipe()
    os.close(reader)
    with started(f"sys.exit(main({words}))", stdout=writer) as process:
        os.close(writer)
        assert process.communicate(timeout=100)[1] == b""
        assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_the_output_has_no_room():
    with open("/dev/full", "w") as full, started("sys.exit(main(['--help']))", stdout=full) as done:
        said = done.communicate(timeout=100)[1]
        assert done.returncode == 2 and said.startswith(
            b"pcpo: the output cannot be written: No sp"
        )


@POSIX
def test_the_output_is_closed():
    code = "sys.stdout = None; sys.exit(main(['--help']))"
    with started(code) as process:
        assert process.communicate(timeout=100)[1] == b"" and process.returncode == 0


def test_a_terminal_that_has_no_such_letters():
    code = "print(main(['train', '\u00e4\u732b.toml']), '\u732b')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with started(code, env=environment) as process:
        out, err = process.communicate(timeout=100)
    assert out.strip() == b"2 \\u732b"
    assert err.startswith(rb"pcpo train: there is no config file \xe4\u732b.toml")


def test_a_run_goes_on_where_nobody_looks_on(tmp_path):
    from comfyui_pcpo.trainers.report.progress import Progress

    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    progress = Progress(Gone())
    with progress.log_to(tmp_path / "worker.log"):
        progress.say("iteration 1")
        progress.say("iteration 2")
    assert (tmp_path / "worker.log").read_text() == "iteration 1\niteration 2\n"

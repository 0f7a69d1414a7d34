"""`pcpo rewards`: list rewards and what they lack, download it, and serve them."""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ...remedies import command
from ..config.arguments import POSITIONAL, Arguments, parse
from ..config.train_config import ConfigError

if TYPE_CHECKING:
    from ..reward_server.download import Offer

WIDTH = 100
FOLDER = "PCPO_REWARDS"
"""Environment variable: the folder of weights."""


class RewardsArguments(Arguments):
    """List rewards, explain one, get what one lacks, or serve some over HTTP."""

    what: Annotated[Literal["list", "get", "serve"], POSITIONAL] = Field(
        description="list all rewards and what they lack, or show one in detail; get (download) "
        "the weights of a reward or a metric; or serve rewards to other processes and machines"
    )
    name: Annotated[str | None, POSITIONAL] = Field(
        default=None, description="a reward; for get also a metric or a weight file"
    )
    folder: str | None = Field(
        default=None,
        description=f"for get: ComfyUI's models folder to put them in; {FOLDER} is used",
    )
    yes: bool = Field(default=False, description="for get: do not ask")


def main(arguments: list[str]) -> int:
    """List rewards, explain one, get what one lacks, or serve some over HTTP."""
    if arguments[:1] == ["serve"]:
        from ..reward_server.server import main as serve

        return serve(arguments[1:])
    a = parse(RewardsArguments, arguments, "pcpo rewards")
    if a.what == "get":
        return _get(a.name or "", None if a.folder is None else Path(a.folder), is_sure=a.yes)
    return _explain(a.name) if a.name else _list()


# --- list ----------------------------------------------------------------------------------------


def _list() -> int:
    from ...pcpo.rewards import REWARDS, reward_class

    for name in sorted(REWARDS):
        made_by = reward_class(name)
        summary = (inspect.getdoc(made_by) or "").split("\n\n")[0].replace("\n", " ")
        print(f"{name:24}{_state(name)}")
        print(textwrap.fill(summary, WIDTH, initial_indent="    ", subsequent_indent="    "))
    listing, getting = command("rewards", "list", "NAME"), command("rewards", "get", "NAME")
    print(f"\n{listing} shows a reward's options, {getting} loads its weights")
    return 0


def _state(name: str) -> str:
    """Whether a reward is available here, in a few words."""
    from ...pcpo.pretrained.catalogue import of_reward
    from ...pcpo.rewards import RewardUnavailable, load_reward

    try:
        load_reward(name)
    except RewardUnavailable as error:
        files = [f"{file.name}, {file.size_told}" for file in of_reward(name)]
        is_weights = files and "package" not in str(error)
        lack = f"weights ({'; '.join(files)})" if is_weights else _package(str(error))
        return f"MISSING {lack}"
    return "ready"


def _package(text: str) -> str:
    return text.split(";")[0].split(" needs ")[-1]


def _explain(name: str) -> int:
    """Print a reward's description, options and files."""
    from ...pcpo.pretrained.catalogue import of_reward
    from ...pcpo.rewards import RewardUnavailable, load_reward, reward_class

    try:
        made_by = reward_class(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    low, high = made_by.bounds if isinstance(made_by.bounds, tuple) else ("?", "?")
    about, _, _ = inspect.cleandoc(made_by.__doc__ or "").partition("\n\nAttributes:")
    print(f"{name}\n\n{about}\n")
    print(f"range     {low} to {high}  {made_by.unit}")
    print(f"gradient  {'yes' if made_by.differentiable else 'no'}, to the pixels")
    said = _options(made_by)
    for option in inspect.signature(made_by).parameters.values():
        print(f"option    {option.name} = {option.default!r}")
        if option.name in said:
            print(textwrap.indent(said[option.name], " " * 10))
    for file in of_reward(name):
        print(f"needs     {file.name} ({file.what}): {file.size_told}, licence {file.licence_told}")
        print(f"          {file.page}")
    try:
        load_reward(name)
    except RewardUnavailable as error:
        print(textwrap.fill(f"missing   {error}", WIDTH, subsequent_indent="          "))
    else:
        print("state     ready")
    return 0


def _options(made_by: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of each option."""
    found: dict[str, str] = {}
    for base in reversed(made_by.__mro__):
        _, _, block = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        lines = re.finditer(r"^    (\w+): (.+(?:\n {8}.+)*)", block.partition("\n\n")[0], re.M)
        found |= {line[1]: textwrap.dedent(" " * 8 + line[2]) for line in lines}
    return found


# --- get -----------------------------------------------------------------------------------------


def _get(name: str, folder: Path | None, *, is_sure: bool) -> int:
    """Show what would be downloaded, ask, download and verify."""
    from ...pcpo.pretrained.catalogue import WEIGHTS, of_metric, of_reward
    from ..reward_server.download import fetch, offers_of

    single = [WEIGHTS[name]] if name in WEIGHTS else []
    files = of_reward(name) or of_metric(name) or single
    if not files:
        raise ConfigError(f"{name!r} has no weights to get; {_gettable()}")
    place = _place(folder)
    wanted = [(file, place / file.folder / file.name) for file in files]
    missing = [(file, target) for file, target in wanted if not target.is_file()]
    for _, target in wanted:
        if target.is_file():
            print(f"{target} is there already")
    offers = [(offer, target) for file, target in missing for offer in offers_of(file)]
    for offer, target in offers:
        size = f"{offer.size / 1e6:,.1f} MB"
        print(f"{offer.source}: {size}, licence {offer.file.licence_told}")
        print(f"    {offer.file.what}; {offer.file.page}\n    -> {_beside(offer, target)}")
    if not offers:
        return 0
    if not is_sure and not _agrees(sum(offer.size for offer, _ in offers)):
        print("nothing was loaded")
        return 1
    for offer, target in offers:
        fetch(offer, _beside(offer, target), print)
    if folder is not None or FOLDER not in os.environ:
        print(f"outside ComfyUI, set {FOLDER} to {place} so that it is found")
    return 0


def _beside(offer: Offer, target: Path) -> Path:
    """The place of a file: the target for the wanted one, beside it for others."""
    return target if offer.is_wanted else target.with_name(Path(offer.name).name)


def _gettable() -> str:
    from ...pcpo.pretrained.catalogue import METRICS, WEIGHTS, of_reward
    from ...pcpo.rewards import REWARDS

    names = [name for name in sorted(REWARDS) if of_reward(name)]
    return (
        f"rewards that have some: {', '.join(names)}; metrics: {', '.join(METRICS)}; "
        f"files: {', '.join(sorted(WEIGHTS))}"
    )


def _place(folder: Path | None) -> Path:
    """ComfyUI's models folder, or one like it; `ConfigError` if none is given."""
    if folder is not None:
        return folder
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    beside = Path(__file__).parents[4] / "models"  # ComfyUI/models
    if beside.is_dir() and beside.with_name("custom_nodes").is_dir():
        return beside
    raise ConfigError(
        f"where to? give --folder FOLDER, ComfyUI's models folder, or set {FOLDER} to one"
    )


def _agrees(size: int) -> bool:
    """Whether a person at the keyboard agrees; no, if nobody is there."""
    if not sys.stdin.isatty():
        print("nobody is there to agree; add --yes")
        return False
    return input(f"load {size / 1e9:.2f} GB? [y/N] ").strip().lower() in ("y", "yes")

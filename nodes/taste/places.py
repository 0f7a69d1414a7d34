"""Where tastes lie: `user/__pcpo/tastes/NAME` of ComfyUI; with --multi-user each user has their
own, in `user/__pcpo/tastes_of_users/USER/NAME`. A client names them, and never by a path. No torch.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...trainers.errors import UserError
from ...trainers.taste.store import Store
from .. import names as files
from ..errors import NodeError
from ..jobs.access import NOBODY, current_user, is_shared


def folder() -> Path:
    """The folder of the tastes that whoever asks may use; it need not be there.

    Raises:
        NodeError: if they are no user of a ComfyUI that keeps its users apart.
    """
    import folder_paths

    root = Path(folder_paths.get_system_user_directory("pcpo"))
    if not is_shared():
        return root / "tastes"
    user = current_user()
    if user is None:
        raise NodeError(NOBODY)
    return root / "tastes_of_users" / user


def names() -> list[str]:
    """The names of the tastes that are there; none for those who are no user."""
    with suppress(NodeError, OSError):
        places = [place for place in folder().iterdir() if place.name[0] != "."]
        return sorted((p.name for p in places if (p / "images").is_dir()), key=str.casefold)
    return []


def open_taste(name: str) -> Store:
    """The taste of a name.

    Raises:
        NodeError: if there is none.
    """
    there, root = names(), folder()
    if name not in there:
        known = f"there is {', '.join(there)}" if there else "make one on the panel's page Taste"
        raise NodeError(f"there is no taste {name[:80]!r}; it may have been deleted; {known}")
    try:
        return Store(root / name)
    except UserError as error:
        raise NodeError(str(error)) from error


def new_taste(name: str) -> Store:
    """Make an empty taste.

    Raises:
        NodeError: if it cannot be called so, another one is, or there is no room for it.
    """
    name, root = files.file_name(name, "the taste name"), folder()
    if name.casefold() in [each.casefold() for each in names()]:
        raise NodeError(f"there is a taste {name!r} already; choose another name")
    try:
        return Store.new(root / name)
    except (UserError, OSError) as error:
        raise NodeError(str(error)) from error

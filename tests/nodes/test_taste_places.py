"""Where ComfyUI's tastes lie: they are named, and never by a path."""

from __future__ import annotations

import sys

import comfy_api_fixture  # noqa: F401
import pytest
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.taste import places


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The user directory of a ComfyUI."""
    paths = sys.modules["folder_paths"]
    monkeypatch.setattr(
        paths, "get_system_user_directory", lambda name: str(tmp_path / f"__{name}")
    )
    return tmp_path / "__pcpo"


def test_a_taste_is_made_listed_and_opened(home):
    assert places.names() == []
    for name in ("warm", " Calm scenes ", "über"):
        places.new_taste(name)
    assert places.names() == ["Calm scenes", "warm", "über"]
    assert places.open_taste("warm").root == home / "tastes" / "warm"
    (home / "tastes" / ".warm.deleted" / "images").mkdir(parents=True)
    (home / "tastes" / "no taste").mkdir()
    assert places.names() == ["Calm scenes", "warm", "über"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../up", "has / in it; use letters"),
        ("a\\b", "has \\ in it"),
        ("a\0", "has a control character in it"),
        ("", "cannot be a file's; write one like my_style"),
        (".hidden", "cannot be a file's"),
        ("con", "cannot be a file's"),
        ("x" * 81, "the taste name has more than 80 bytes"),
        ("Warm", "there is a taste 'Warm' already; choose another name"),
    ],
)
def test_names_that_are_refused(home, name, why):
    places.new_taste("warm")
    with pytest.raises(NodeError) as refused:
        places.new_taste(name)
    assert why in str(refused.value)
    assert places.names() == ["warm"]


@pytest.mark.parametrize("name", ["", ".", "..", "../tastes/warm", "warm/", "WARM", "x\0"])
def test_only_what_is_there_is_opened(home, name):
    with pytest.raises(NodeError, match="it may have been deleted; make one on the panel's page"):
        places.open_taste(name)
    places.new_taste("warm")
    with pytest.raises(NodeError, match=r"there is no taste .*; there is warm"):
        places.open_taste(name)


def test_a_folder_that_cannot_be_written_is_named(home):
    home.mkdir()
    (home / "tastes").write_text("a file")
    with pytest.raises(NodeError, match="tastes"):
        places.new_taste("warm")


def test_users_have_tastes_of_their_own(home, monkeypatch):
    monkeypatch.setattr(places, "is_shared", lambda: True)
    for user in ("ann_1", "bob_2"):
        monkeypatch.setattr(places, "current_user", lambda user=user: user)
        assert places.names() == []
        places.new_taste("warm")
        assert places.open_taste("warm").root == home / "tastes_of_users" / user / "warm"
    monkeypatch.setattr(places, "current_user", lambda: None)
    assert places.names() == []
    with pytest.raises(NodeError, match="names none of its users"):
        places.open_taste("warm")

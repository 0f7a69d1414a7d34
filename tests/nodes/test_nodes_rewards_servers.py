"""Which servers a graph may have images sent to: those that the owner of ComfyUI has named."""

from __future__ import annotations

import json
import sys
import types

import comfy_api_fixture  # noqa: F401  before any node
import pytest
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.rewards import make as rewards_make
from comfyui_pcpo.nodes.training.rewards import Judge, guard_of, section_of
from comfyui_pcpo.pcpo.remote import http as web
from comfyui_pcpo.pcpo.rewards.combine import Affine

NAMED = "https://vlm.example:8443/v1"
ASKING = {"remote": "PCPO_REWARDS", "vlm_judge": "PCPO_VLM", "vlm_bert_score": "PCPO_VLM"}


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    """No server is named, and none is ever asked."""
    for key in ("PCPO_REWARDS", "PCPO_VLM"):
        monkeypatch.delenv(f"{key}_URL", raising=False)
    monkeypatch.setattr(web, "_once", lambda *_: pytest.fail("a server was asked"))


@pytest.fixture
def user(tmp_path, monkeypatch):
    """ComfyUI's folder for this pack, which no HTTP request can write to."""
    fake = types.SimpleNamespace(
        get_system_user_directory=lambda name: str(tmp_path / f"__{name}"),
        models_dir=str(tmp_path),
        add_model_folder_path=lambda name, path: None,
        get_folder_paths=lambda name: [],
    )
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    (tmp_path / "__pcpo").mkdir()
    return tmp_path / "__pcpo"


def url_of(name, options=""):
    made = rewards_make.named_reward(name, "automatic", "automatic", options)
    return json.loads(made.options).get("url"), made.made.url


def asked(url):
    return json.dumps({"url": url})


@pytest.mark.parametrize("name", ["remote", "vlm_judge"])
@pytest.mark.parametrize(
    "url",
    [
        *("http://169.254.169.254", "http://10.0.0.1:8188/v1", "https://evil.example/v1"),
        *("http://127.0.0.1:9", "http://localhost:8000/v1", "http://[::1]:8000/v1"),
        *("https://vlm.example/v1", "http://vlm.example:8443/v1", f"{NAMED}/../admin"),
        *("https://vlm.example.:8443/v1", "https://vlm.example:8443/V1", f"{NAMED}x"),
        *("https://user@vlm.example:8443/v1", "https://vlm.example:8443@evil.example/v1"),
        *(f"{NAMED}?a=b", f"{NAMED}#a", f"{NAMED}\\@evil.example", "file:///etc/passwd", "", " "),
        *(5, None, [NAMED], {"a": 1}, True),
    ],
)
def test_a_graph_may_not_choose_where_images_go(name, url, user, monkeypatch):
    monkeypatch.setenv(f"{ASKING[name]}_URL", NAMED)
    with pytest.raises(NodeError, match="has not allowed") as caught:
        url_of(name, asked(url))
    assert f"{ASKING[name]}_URL" in str(caught.value) and str(user) in str(caught.value)
    assert "user@" not in str(caught.value) and "\n" not in str(caught.value)


def test_the_text_score_is_refused_before_its_weights_are_looked_for(user):
    with pytest.raises(NodeError, match="has not allowed"):
        url_of("vlm_bert_score", asked("https://evil.example/v1"))


@pytest.mark.parametrize("name", ["remote", "vlm_judge"])
def test_the_usual_address_is_this_machines(name):
    usual = rewards_make.options_of(name)["url"].default
    assert url_of(name) == (None, usual)
    assert url_of(name, asked(f"{usual}/")) == (usual, usual)


@pytest.mark.parametrize("name", ["remote", "vlm_judge"])
def test_the_environment_names_an_address(name, monkeypatch):
    monkeypatch.setenv(f"{ASKING[name]}_URL", f"{NAMED}/ ")
    assert url_of(name) == (NAMED, NAMED)
    for url in (NAMED, f"{NAMED}/", "HTTPS://VLM.example:8443/v1"):
        assert url_of(name, asked(url)) == (NAMED, NAMED)
    other = {"remote": "vlm_judge", "vlm_judge": "remote"}[name]
    with pytest.raises(NodeError, match="has not allowed"):
        url_of(other, asked(NAMED))


def test_a_file_names_others(user):
    (user / "reward_servers.txt").write_text(
        f"# ours\n\nhttp://gpu:8765  \n{NAMED}\n", encoding="utf-8-sig"
    )
    assert url_of("remote", asked("http://gpu:8765"))[1] == "http://gpu:8765"
    assert url_of("vlm_judge", asked(NAMED))[1] == NAMED
    assert url_of("remote")[0] is None  # which of them is the graph's to say
    with pytest.raises(NodeError, match="has not allowed"):
        url_of("remote", asked("http://gpu:8766"))


@pytest.mark.parametrize("line", ["gpu:8765", "ftp://gpu", "http://me:secret@gpu"])
def test_a_line_that_is_no_address_is_said(user, line):
    (user / "reward_servers.txt").write_text(line, encoding="utf-8")
    with pytest.raises(NodeError, match=r"reward_servers\.txt: the url") as caught:
        url_of("remote", asked("http://gpu:8765"))
    assert "secret" not in str(caught.value)


def test_a_job_is_given_the_owners_address(monkeypatch):
    monkeypatch.setenv("PCPO_REWARDS_URL", NAMED)
    judge = Judge(rewards_make.named_reward("remote", "automatic", "automatic", ""), 1.0, Affine())
    assert section_of([judge])["remote"]["options"] == {"url": NAMED}
    assert guard_of([judge])["reward_options"] == [f'url="{NAMED}"']


def test_an_address_that_is_named_no_more_starts_no_job(monkeypatch):
    monkeypatch.setenv("PCPO_REWARDS_URL", NAMED)
    made = rewards_make.named_reward("remote", "automatic", "automatic", asked(NAMED))
    monkeypatch.delenv("PCPO_REWARDS_URL")
    with pytest.raises(NodeError, match="has not allowed"):
        rewards_make.remake(made.name, made.options)


def test_other_options_have_no_address(user):
    with pytest.raises(NodeError, match="has no option 'url'"):
        rewards_make.named_reward("scene", "automatic", "automatic", asked(NAMED))

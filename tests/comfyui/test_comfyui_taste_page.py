"""The page Taste in real ComfyUI and a browser: votes by keys and mouse, a killed server, a job.

What it needs is in comfyui_fixture.py; the browser needs playwright's client and a Chromium.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from comfyui_fixture import HOST, needs_host
from comfyui_pcpo.trainers.taste.store import Store
from comfyui_server_fixture import Server
from PIL import Image

pytestmark = needs_host

PROMPTS = "a red circle\na blue square\na green cross over a red box\na golden disc"
QUICK = {
    **{"run_iterations": 3, "run_save_every": 3, "run_micro_batch": 4, "run_eval_prompts": 2},
    **{"run_eval_steps": 2, "prompts_per_iteration": 2, "prompts_images_per_prompt": 4},
    **{"sampler_steps": 3, "optimizer_updates": 1, "taste_ask_every": 1, "taste_pairs": 2},
}
APP = "const app = window.comfyAPI?.app?.app ?? window.app;"
READY = f"() => {{ {APP} return app?.graph && LiteGraph.registered_node_types.PCPOTaste; }}"
OPEN = f"() => {{ {APP} app.extensionManager.command.execute('Workspace.ToggleSidebarTab.pcpo'); }}"
PLACES = f"""() => {{ {APP} const nodes = app.graph.nodes ?? app.graph._nodes;
    app.canvas.selectNodes(nodes);
    return nodes.map((node) => [...node.pos, node.mode]); }}"""
SEEN = """() => {
    const [stage] = document.getElementsByTagName("dialog");
    return stage?.open && !stage.ariaBusy && [...stage.querySelectorAll(".pcpo-choice img")]
      .every((image) => image.complete && image.naturalWidth);
}"""


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def rated(name: str) -> dict[str, Any]:
    """Sixteen pictures of the demo model put up for votes."""
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
    given = {"negative": "", "cfg": 1.0, "width": 64, "height": 64, "prompts": PROMPTS}
    given |= {"images_per_prompt": 4, "batch": 16, "seed": 1}
    noise = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    return {
        "load": node("PCPODemoModel", demo="tiny-sd"),
        "sigmas": node("PCPOScheduler", model=["load", 0], steps=3, grid="auto", denoise=1.0),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "draw": node("PCPODrawPrompts", **wires, **given, **noise),
        "rate": node(
            "PCPORateImages", images=["draw", 0], taste=name, prompt=["draw", 1], pairs=24
        ),
    }


def trained(name: str) -> dict[str, Any]:
    """A training of seconds that asks after every iteration."""
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
    wires |= {"reward": ["taste", 0], "prompts": ["prompts", 0], "settings": ["settings", 0]}
    about = {"continue_from": "none", "on_server_exit": "save_and_stop", "pause_while_busy": False}
    quick = {f"preset.{key}": value for key, value in QUICK.items()}
    return {
        "load": node("PCPODemoModel", demo="tiny-sd"),
        "taste": node("PCPOTaste", taste=name),
        "prompts": node("PCPOPrompts", source="scenes"),
        "settings": node("PCPOTrainingSettings", preset="demo-taste", **quick),
        "train": node("PCPOTrainInBackground", **wires, **about, name="asking"),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(HOST, tmp_path_factory.mktemp("comfyui")) as started:
        started.post("/settings/Comfy.TutorialCompleted", True)  # else templates lie over the page
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser) -> Iterator[Any]:
    """ComfyUI's page with the panel shown; at the end nothing may have been raised in it."""
    raised: list[str] = []
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.set_default_timeout(90_000)
    page.on("pageerror", lambda error: raised.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}")
    show(page)
    yield page
    page.close()
    assert not raised


def show(page: Any) -> None:
    """Show the panel's page Taste."""
    page.wait_for_function(READY)
    page.wait_for_timeout(2000)  # the frontend opens its own first workflow
    page.keyboard.press("Escape")
    if not page.locator("section.pcpo").is_visible():
        page.evaluate(OPEN)
    page.locator(".pcpo-nav").get_by_role("button", name="Taste").click()


def vote_button(page: Any) -> None:
    page.get_by_role("button", name=re.compile("^Vote( on|$)")).click()
    page.wait_for_function(SEEN)


def blueness(store: Store, digest: str) -> float:
    with Image.open(store.image_file(digest)) as picture:
        pixels = np.asarray(picture, dtype=float) / 255
    return float((pixels[..., 2] - pixels[..., 0]).mean())


def cast(page: Any, side: int, is_clicked: bool) -> None:
    if is_clicked:
        page.locator("dialog .pcpo-choice").nth(side).click()
    else:
        page.keyboard.press(("ArrowLeft", "ArrowRight")[side])


def voter(page: Any, store: Store) -> Callable[[int], None]:
    """Votes for the bluer picture, by keys and mouse in turn."""

    def vote(count: int) -> None:
        for _ in range(count):
            page.wait_for_function(SEEN)
            before = len(store.votes())
            images = page.locator("dialog .pcpo-choice img")
            digests = [images.nth(i).get_attribute("src").split("/")[-1] for i in range(2)]
            left, right = (blueness(store, digest) for digest in digests)
            side, is_clicked = int(right > left), bool(before % 2)
            end, error = time.monotonic() + 120, page.locator("dialog .pcpo-error")
            cast(page, side, is_clicked)
            while len(store.votes()) == before:
                assert time.monotonic() < end, error.inner_text()
                page.wait_for_timeout(200)
                if error.is_visible() and page.evaluate(SEEN):  # it was not kept: once more
                    cast(page, side, is_clicked)

    return vote


def wait(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_votes_by_keys_and_mouse_outlive_a_reload_and_a_killed_server(server, page):
    assert server.run(rated("blue"))["rate"]["text"][0].startswith("24 new pairs")
    store = Store(server.folder / "user" / "__pcpo" / "tastes" / "blue")
    page.get_by_role("button", name="Vote on 24 pairs").wait_for()  # by itself
    vote, before = voter(page, store), page.evaluate(PLACES)
    vote_button(page)
    vote(8)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    page.keyboard.press("ArrowLeft")
    page.locator("dialog .pcpo-error").filter(has_text="does not answer").wait_for()
    assert len(Store(store.root).votes()) == 8
    server.__enter__()
    page.wait_for_timeout(4000)  # the browser still has a connection to the old one
    vote(4)
    assert page.locator("dialog .pcpo-error").is_hidden()
    for key in ("r", "w", "n", "z", "Delete", "ArrowUp", "z"):  # neither, undo, skip, undo
        page.wait_for_function(SEEN)
        page.keyboard.press(key)
    page.wait_for_function(SEEN)
    page.keyboard.press("Escape")
    assert page.evaluate(PLACES) == before  # the keys were the stage's alone
    page.reload()
    show(page)
    vote_button(page)
    vote(20)
    assert len(Store(store.root).votes()) == 32
    page.keyboard.press("Escape")
    page.locator(".pcpo-said", has_text="fitted to 32 votes").wait_for()
    assert "agrees with you on" in page.locator(".pcpo-said").inner_text()


def test_a_job_asks_on_its_page_and_its_samples_are_rated(server, page):
    server.run(rated("asked"))
    store = Store(server.folder / "user" / "__pcpo" / "tastes" / "asked")
    for number, pair in enumerate(store.waiting()):
        store.vote(pair, "left" if number % 2 else "right")
    server.run(trained("asked"))
    wait(lambda: any(", iteration " in pair.source for pair in store.waiting()))
    page.locator(".pcpo-nav").get_by_role("button", name="Training jobs").click()
    page.locator(".pcpo-card button").first.click()
    page.get_by_role("button", name=re.compile("pairs? to vote on")).click()
    page.wait_for_function(SEEN)
    assert re.search("asking, iteration [123]", page.locator("dialog").inner_text())
    voter(page, store)(1)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Rate this job’s samples").click()
    page.locator("dialog", has_text="samples of asking").wait_for()
    voter(page, store)(1)

"""The page Taste in a browser, on the routes and stores that ComfyUI has."""

from __future__ import annotations

import re
import sys
from typing import Any

import comfy_api_fixture  # noqa: F401
import pytest
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.nodes.taste import desks, places, routes
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.taste.store import Pair, Store
from panel_fixture import job
from taste_fixture import digest_utilities, pictures

pytest_plugins = "panel_browser_fixture"
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

HOSTILE = '<img src=x onerror="fixture.harm = 1"></script><script>fixture.harm = 2</script>'
RED = "a hill"
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown", "skip": "ArrowUp",
        "neither": "n"}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, server):
    """The folder of the tastes, which the server of the page answers for."""
    paths = sys.modules["folder_paths"]
    monkeypatch.setattr(
        paths, "get_system_user_directory", lambda name: str(tmp_path / f"__{name}")
    )
    monkeypatch.setattr(desks, "_desks", {})
    server.tastes = answer
    return tmp_path / "__pcpo" / "tastes"


def answer(method: str, path: str, asked: dict[str, Any]) -> Any:
    """As the handlers that routes.register() adds."""
    parts = path.split("/")[1:]
    if not parts:
        return routes.tastes() if method == "GET" else routes.create(asked)
    name, *rest = parts
    if method == "POST":
        return routes.act(name, rest[0], asked)
    if rest[:1] == ["images"]:
        return routes.picture(name, rest[1])
    return routes.ranking(name) if rest == ["ranking"] else routes.look(name)


@pytest.fixture
def warm() -> Store:
    """A taste with pictures to choose from."""
    store = places.new_taste("warm")
    store.offer(pictures(60), [RED] * 60, "x")
    return store


@pytest.fixture
def open_page(show):
    """Opens the page Taste."""

    def opened(query: str = "width=500px", **options: Any) -> Any:
        page = show(query, **{"width": 1366, "height": 768, **options})
        page.locator(".pcpo-nav").get_by_role("button", name="Taste").click()
        return page

    return opened


@pytest.fixture
def open_stage(open_page):
    """Opens the stage."""

    def opened(**options: Any) -> Any:
        page = open_page(**options)
        page.get_by_role("button", name=re.compile("^Vote")).click()
        seen(page)
        return page

    return opened


def stage(page: Any) -> Any:
    return page.locator("dialog.pcpo-ballot")


def seen(page: Any) -> None:
    """Wait until both pictures are there, and nothing is asked."""
    page.wait_for_function("""() => {
      const [stage] = document.getElementsByTagName("dialog");
      const images = [...(stage ?? document).querySelectorAll(".pcpo-choice img")];
      return stage?.open && !stage.ariaBusy && images.every((i) => i.complete && i.naturalWidth);
    }""")


def shown(page: Any) -> list[str]:
    """The digests of the two pictures."""
    seen(page)
    images = stage(page).locator(".pcpo-choice img")
    return [images.nth(i).get_attribute("src").split("/")[-1] for i in range(2)]


def wait_for_votes(page: Any, store: Store, count: int) -> None:
    for _ in range(200):
        if len(store.votes()) == count:
            return
        page.wait_for_timeout(25)
    assert len(store.votes()) == count


# --- voting --------------------------------------------------------------------------------------


def test_keys_vote(open_stage, warm):
    page = open_stage()
    for number, choice in enumerate(("left", "right", "tie", "neither")):
        left, right = shown(page)
        page.keyboard.press(KEYS[choice])
        wait_for_votes(page, warm, number + 1)
        vote = warm.votes()[-1]
        assert (vote.left, vote.right, vote.choice) == (left, right, choice)
    before = shown(page)
    page.keyboard.press(KEYS["skip"])
    page.wait_for_function("(old) => !document.querySelector('.pcpo-choice img').src.endsWith(old)",
                           arg=before[0])  # fmt: skip
    assert len(warm.votes()) == 4
    page.keyboard.press("Z")  # takes the skip back
    page.wait_for_function("(old) => document.querySelector('.pcpo-choice img').src.endsWith(old)",
                           arg=before[0])  # fmt: skip
    page.keyboard.press("z")
    wait_for_votes(page, warm, 3)
    expect(stage(page)).to_contain_text("warm: 3 votes")


def test_mouse_and_touch_vote(open_stage, warm):
    page = open_stage(has_touch=True)
    right = shown(page)[1]
    page.get_by_role("button", name=f"right picture: {RED}").click()
    wait_for_votes(page, warm, 1)
    assert (warm.votes()[0].right, warm.votes()[0].choice) == (right, "right")
    shown(page)
    page.get_by_role("button", name=f"left picture: {RED}").tap()
    wait_for_votes(page, warm, 2)
    seen(page)
    stage(page).get_by_role("button", name="Equally good").click()
    wait_for_votes(page, warm, 3)
    seen(page)
    stage(page).get_by_role("button", name="Undo").click()
    wait_for_votes(page, warm, 2)


def test_a_double_click_and_a_held_key_are_one_vote(open_stage, warm):
    page = open_stage()
    page.locator(".pcpo-choice").first.dblclick()
    page.wait_for_timeout(400)
    assert len(warm.votes()) == 1
    seen(page)
    page.keyboard.down("ArrowLeft")
    for _ in range(5):
        page.keyboard.down("ArrowLeft")  # repeated
    page.keyboard.up("ArrowLeft")
    page.wait_for_timeout(400)
    assert len(warm.votes()) == 2


def test_what_is_not_seen_is_not_judged(open_stage, warm, server):
    page = open_stage()
    shown(page)
    page.route("**/images/*", lambda route: None)  # never answered
    page.reload()
    page.wait_for_function("globalThis.fixture?.ready")
    page.get_by_role("button", name=re.compile("^Vote")).click()
    expect(page.locator(".pcpo-choice").first).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.locator(".pcpo-choice").first.click()
    page.wait_for_timeout(300)
    assert warm.votes() == []


def test_keys_are_the_stage_s_alone(open_stage, warm):
    page = open_stage()
    page.evaluate("""() => {
      fixture.pressed = [];
      addEventListener("keydown", (event) => fixture.pressed.push(event.key));
    }""")
    for key in ("ArrowLeft", "q", "Delete", "z"):
        seen(page)
        page.evaluate("document.activeElement.blur()")  # wherever the focus is
        page.keyboard.press(key)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(200)
    assert page.evaluate("fixture.pressed") == ["Control", "s"]
    assert warm.votes() == []  # one, taken back
    page.keyboard.press("Escape")
    expect(stage(page)).to_be_hidden()
    for key in ("ArrowLeft", "ArrowRight", "n"):
        page.keyboard.press(key)
    page.get_by_role("button", name="New …").click()
    page.keyboard.type("zn")
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(300)
    assert warm.votes() == [] and page.locator("#pcpo-taste-name").input_value() == "zn"


def test_forty_pairs_and_it_knows_what_they_say(open_stage, warm):
    utilities = digest_utilities(warm, pictures(60))
    page = open_stage()
    for number in range(40):
        left, right = shown(page)
        choice = "left" if utilities[left] > utilities[right] else "right"
        if number % 2:
            page.keyboard.press(KEYS[choice])
        else:
            page.locator(".pcpo-choice").nth(int(choice == "right")).click()
        wait_for_votes(page, warm, number + 1)
    seen(page)
    expect(stage(page)).to_contain_text("warm: 40 votes")
    expect(stage(page)).to_contain_text("agrees with you on")
    page.get_by_role("button", name="Close").click()
    taste = page.locator(".pcpo-job:visible", has_text="Taste").first
    expect(taste.locator(".pcpo-said")).to_contain_text("agrees with you on")
    expect(taste.get_by_role("img", name=re.compile("Random pairs"))).to_be_visible()
    expect(taste.locator(".pcpo-votes li")).to_have_count(8)
    best = taste.get_by_role("img", name="Liked best 1", exact=True).get_attribute("src")
    assert utilities[best.split("/")[-1]] > sorted(utilities.values())[-6]


# --- tastes --------------------------------------------------------------------------------------


def test_the_first_taste_is_made_and_says_how_to_get_pictures(open_page):
    page = open_page()
    expect(page.locator("section.pcpo")).to_contain_text("A taste learns what you like")
    page.get_by_label("Name of the new taste").fill("a/b")
    page.get_by_role("button", name="Make").click()
    expect(page.get_by_role("alert")).to_contain_text("the taste name 'a/b' has / in it")
    page.get_by_label("Name of the new taste").fill("wärm & 100% {x}")
    page.keyboard.press("Enter")
    expect(page.get_by_label("taste", exact=True)).to_have_value("wärm & 100% {x}")
    assert places.names() == ["wärm & 100% {x}"]
    expect(page.locator(".pcpo-empty:visible")).to_contain_text("Rate this job’s samples")
    vote = page.get_by_role("button", name="Vote", exact=True)
    expect(vote).to_have_attribute("aria-disabled", "true")


def test_tastes_are_chosen_and_a_reload_keeps_the_choice(open_page, warm):
    places.new_taste("cold")
    page = open_page()
    choice = page.get_by_label("taste", exact=True)
    expect(choice).to_have_value("cold")
    choice.select_option("warm")
    expect(page.get_by_role("button", name="Vote", exact=True)).not_to_have_attribute(
        "aria-disabled", "true"
    )
    page.reload()
    page.wait_for_function("globalThis.fixture?.ready")
    expect(choice).to_have_value("warm")


def test_a_taste_is_deleted_after_a_question_that_says_what(open_page, warm, home):
    warm.put([Pair(left=o.image, right=warm.offers()[0].image) for o in warm.offers()[1:4]])
    for pair in warm.waiting():
        warm.vote(pair, "left")
    page = open_page()
    page.get_by_role("button", name="Delete …").click()
    asked = page.get_by_role("alertdialog")
    expect(asked).to_contain_text("Delete “warm” with its 3 votes and 60 pictures?")
    page.get_by_role("button", name="Keep").click()
    assert places.names() == ["warm"]
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator(".pcpo-note:visible")).to_contain_text("The taste “warm” was deleted.")
    assert list(home.iterdir()) == []


# --- beside others -------------------------------------------------------------------------------


def test_new_pairs_appear_by_themselves(open_page, warm):
    warm.offer(pictures(2, seed=8), ["two"] * 2, "x")
    page = open_page()
    expect(page.get_by_role("button", name="Vote", exact=True)).to_be_visible()
    for offer in warm.offers():
        warm.image_file(offer.image).unlink()
    page.get_by_role("button", name="Vote", exact=True).click()
    expect(stage(page)).to_contain_text("There is no pair left")
    warm.offer(pictures(2, seed=9), ["a new one"] * 2, "x")
    left, right = [offer.image for offer in warm.offers()]
    warm.put([Pair(left=left, right=right, prompt="a new one", source="f" * 16 + ", iteration 5")])
    expect(stage(page).locator(".pcpo-prompt")).to_have_text("a new one", timeout=9000)
    assert shown(page) == [left, right]


def test_two_windows_show_different_pairs_and_lose_no_vote(open_stage, warm):
    pages = [open_stage(), open_stage()]
    assert not {*shown(pages[0])} & {*shown(pages[1])}
    for _ in range(10):
        for page in pages:
            seen(page)
            page.keyboard.press("ArrowLeft")
    for page in pages:
        seen(page)
    wait_for_votes(pages[0], warm, 20)


def test_a_reload_loses_no_vote(open_stage, warm):
    page = open_stage()
    for count in range(1, 4):
        seen(page)
        page.keyboard.press("ArrowLeft")
        wait_for_votes(page, warm, count)
        page.reload()
        page.wait_for_function("globalThis.fixture?.ready")
        page.get_by_role("button", name=re.compile("^Vote")).click()
    seen(page)
    expect(stage(page)).to_contain_text("warm: 3 votes")


def test_a_deleted_taste_is_one_sentence_on_the_page(open_stage, warm):
    page = open_stage()
    warm.delete()
    page.keyboard.press("ArrowLeft")
    expect(stage(page)).to_be_hidden()
    alert = page.get_by_role("alert").filter(visible=True)
    expect(alert).to_contain_text("there is no taste 'warm'; it may have been deleted")
    expect(alert).to_have_count(1)


def test_a_server_that_is_gone_is_said_and_the_vote_is_asked_again(open_stage, warm, server):
    page = open_stage()
    before = shown(page)
    page.route("**/pcpo/tastes/**", lambda route: route.abort())
    page.keyboard.press("ArrowLeft")
    expect(stage(page).get_by_role("alert")).to_contain_text("ComfyUI does not answer")
    page.unroute("**/pcpo/tastes/**")
    assert shown(page) == before
    page.keyboard.press("ArrowLeft")
    wait_for_votes(page, warm, 1)
    expect(stage(page).get_by_role("alert")).to_be_hidden()


def test_prompts_are_text(open_page):
    store = places.new_taste("odd")
    store.offer(pictures(6), [HOSTILE] * 6, HOSTILE)
    page = open_page()
    page.get_by_role("button", name=re.compile("^Vote")).click()
    seen(page)
    page.keyboard.press("ArrowLeft")
    wait_for_votes(page, store, 1)
    expect(stage(page).locator(".pcpo-prompt")).to_have_text(HOSTILE)
    assert page.evaluate("fixture.harm ?? null") is None


# --- a job's page --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A job's folder with samples, in a registry that starts nothing."""
    jobs = JobRegistry(tmp_path / "jobs", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr(jobs, "wake", lambda: None)
    monkeypatch.setattr(routes, "registry", lambda: jobs)
    folder = jobs.folder(jobs.create(TrainConfig(), "scenes", "cpu"))
    for iteration in (0, 6, 12):
        place = folder.samples / f"{iteration:05}"
        place.mkdir(parents=True)
        for index, picture in enumerate(pictures(4, seed=iteration)):
            picture.save(place / f"{index:03}.png")
        write_json(place / "scores.json", [{"prompt": f"p{i}", "reward": 0.5} for i in range(4)])
    return folder


def open_job(page: Any) -> None:
    page.locator(".pcpo-card button").click()
    expect(page.locator(".pcpo-job:visible:not(.pcpo-waiting)")).to_have_count(1)


def test_a_job_s_samples_are_rated(show, server, folder):
    server.jobs = [job() | {"id": folder.root.name}]
    page = show("width=500px", width=1366, height=768)
    open_job(page)
    page.get_by_role("button", name="Rate this job’s samples").click()
    seen(page)
    assert places.names() == ["my-taste"]
    expect(stage(page)).to_contain_text("samples of scenes")
    page.keyboard.press("ArrowRight")
    wait_for_votes(page, places.open_taste("my-taste"), 1)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Rate this job’s samples")).to_be_focused()


def test_a_job_that_asks_shows_its_pairs(show, server, warm):
    asking = job()
    asking["config"]["rewards"] = {
        "taste": {"weight": 1.0, "options": {"folder": str(warm.root), "features": None}}
    }
    server.jobs = [asking]
    page = show("width=500px", width=1366, height=768)
    open_job(page)
    link = page.get_by_role("button", name=re.compile("to vote on"))
    expect(link).to_be_hidden()
    left, right = [offer.image for offer in warm.offers()][:2]
    warm.put([Pair(left=left, right=right, source=f"{asking['id']}, iteration 5")])
    expect(link).to_have_text("1 pair to vote on", timeout=9000)  # without a reload
    link.click()
    seen(page)
    expect(stage(page)).to_contain_text("scenes_1, iteration 5")
    assert shown(page) == [left, right]


def test_a_job_with_another_reward_asks_nothing(show, server, warm):
    server.jobs = [job()]
    page = show("width=500px", width=1366, height=768)
    open_job(page)
    page.wait_for_timeout(500)
    assert server.reads("/api/pcpo/tastes") == 0


# --- how it looks --------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (1600, 950), (390, 844)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_stage_fits_the_window(open_page, warm, width, height, theme):
    query = f"theme={theme}" + ("&width=500px" if width > 500 else "")
    page = open_page(query, width=width, height=height)
    page.get_by_role("button", name=re.compile("^Vote")).click()
    seen(page)
    box = page.evaluate("""() => {
      const [stage] = document.getElementsByTagName("dialog");
      const pictures = [...stage.querySelectorAll(".pcpo-choice")].map((each) => {
        const { width, height, bottom, right } = each.getBoundingClientRect();
        return { width, height, bottom, right };
      });
      return { high: stage.scrollHeight, wide: stage.scrollWidth, pictures };
    }""")
    assert box["high"] <= height and box["wide"] <= width
    for each in box["pictures"]:
        assert each["width"] > 250 and each["height"] > 200
        assert each["width"] * each["height"] > 0.2 * width * height


def test_every_control_has_a_name_and_the_focus_stays_on_the_stage(open_stage, warm):
    page = open_stage()
    names = page.evaluate("""() => [...document.querySelectorAll("dialog button")].map((each) =>
      each.innerText.trim() || each.querySelector("img")?.alt)""")
    assert all(names) and len({*names}) == len(names)
    for _ in range(12):
        page.keyboard.press("Tab")
        where = page.evaluate("document.activeElement.closest('dialog, body')?.tagName")
        assert where in ("DIALOG", "BODY")  # the browser's own controls come between
    page.keyboard.press("Escape")
    expect(stage(page)).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent").startswith("Vote")

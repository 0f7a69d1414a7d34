"""The panel in a browser: what it shows in each state, what its buttons ask for, what survives an
update.

Needs playwright's Python client and a Chromium: one on the PATH, or playwright's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from panel_fixture import STATES, SUMMARY, PanelServer, job, line, samples
from words_fixture import longer

pytest_plugins = "panel_browser_fixture"
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

JSON = "application/json"
HOSTILE = '<img src=x onerror="fixture.harm = 1"></script><script>fixture.harm = 2</script>'
FIRST = f"/api/pcpo/jobs/{1:016x}"
OFFERED = {
    "queued": {"Take out of the queue", "Delete …"},
    "preparing": {"Pause", "Stop after this iteration"},
    "running": {"Pause", "Stop after this iteration", "Stop now", "Sample now"},
    "pausing": {"Continue", "Stop after this iteration", "Stop now"},
    "paused": {"Continue", "Stop after this iteration"},
    "stopping": {"Stop now"},
    "stopped": {"Resume training", "Delete …"},
    "done": {"Delete …"},
    "failed": {"Resume training", "Delete …"},
    "lost": {"Resume training", "Delete …"},
}
ALWAYS = {"Add Load Job LoRA to graph"}


@pytest.fixture
def open_job(show, server) -> Callable[..., Any]:
    """Opens the page of a job."""

    def opened(chosen: dict | None = None, **options: Any) -> Any:
        server.jobs = [chosen or job()]
        page = show(**options)
        page.locator(".pcpo-card button").click()
        expect(page.locator(".pcpo-job:visible:not(.pcpo-waiting)")).to_have_count(1)
        return page

    return opened


def say(page: Any, server: PanelServer) -> None:
    """The message by which ComfyUI tells of all jobs."""
    page.evaluate("said => fixture.say('pcpo.jobs', said)", server.message())


def advance(server: PanelServer, iteration: int) -> None:
    """Another iteration of the first job, with samples."""
    first = server.jobs[0]
    first["metrics"].append(line(iteration))
    first["samples"].append(samples(iteration))
    first["log"].append(f"iteration {iteration}")
    first.update(iteration=iteration, reward=0.5)


def named(page: Any, text: str) -> Any:
    return page.get_by_role("button", name=text, exact=True)


def part(page: Any, title: str) -> Any:
    return page.locator("details.pcpo-part", has=page.locator("h3", has_text=title))


def in_module(page: Any, module: str, body: str, argument: Any = None) -> Any:
    """The value of a function's body in which `m` is a module of the panel and `a` the argument."""
    load = f"const m = await import('/extensions/pcpo/{module}.js');"
    return page.evaluate(f"async (a) => {{ {load} {body} }}", argument)


def eventually(is_true: Callable[[], bool], page: Any) -> None:
    until = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < until
        page.wait_for_timeout(50)


def test_the_node_that_trains_says_how_its_job_goes(show, server):
    server.jobs = [job(state="done", iteration=60)]
    page = show()
    expect(page.locator(".pcpo-card")).to_be_visible()
    output = {"pcpo_job": [f"{1:016x}"], "text": ["preparing\nLoRA: a.safetensors\nabout 15 s"]}
    page.evaluate("said => fixture.say('executed', said)", {"node": 7, "output": output})
    say(page, server)
    eventually(lambda: page.evaluate("fixture.told.length") == 1, page)
    kind, told = page.evaluate("fixture.told[0]")
    assert (kind, told["nodeId"]) == ("progress_text", "7")
    first, *rest = told["text"].split("  \n")  # lines of Markdown, which Nodes 2.0 reads
    assert first.startswith("finished · Iteration 60 of 60 · Held-out reward 0.400 → ")
    assert rest == ["LoRA: a.safetensors", "about 15 s"]


# --- weights -----------------------------------------------------------------------------------

HEAD = {"key": "aesthetic_head", "name": "head.pth", "folder": "reward_models", "page": "https://x/y",
        "size": 3_714_759, "licence": "Apache-2.0", "unverified": False, "rewards": ["aesthetic"],
        "refusal": None, "state": "missing", "done": 0, "speed": 0.0, "message": ""}  # fmt: skip
POSTED = "/api/pcpo/weights/aesthetic_head/"


def test_a_missing_file_is_downloaded_from_its_page(show, server):
    other = HEAD | {"key": "tower", "name": "tower.safetensors", "state": "there"}
    server.weights = {"files": [HEAD, other], "off": None}
    page = show()
    named(page, "Weights").click()
    row = page.locator(".pcpo-file", has_text="head.pth")
    expect(row).to_contain_text("3.71 MB, licence Apache-2.0, for aesthetic")
    expect(row).to_contain_text("Goes into models/reward_models as head.pth.")
    expect(page.locator(".pcpo-file", has_text="tower")).to_be_hidden()  # folded
    loading = HEAD | {"state": "loading", "done": 928_690, "speed": 5e4}
    server.weights["files"] = [loading, other]
    named(row, "Download 3.71 MB").click()
    expect(row.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "25")
    expect(row).to_contain_text("929 kB of 3.71 MB, about 56 sec left")
    assert [post[1] for post in server.posts()] == [POSTED + "download"]
    server.weights["files"] = [HEAD | {"done": 928_690}, other]
    named(row, "Cancel").click()
    expect(page.locator(".pcpo-note")).to_have_text(
        "The download was cancelled; what has arrived is kept."
    )
    server.weights["files"] = [loading, other]
    named(row, "Go on downloading").click()
    expect(row.get_by_role("progressbar")).to_be_visible()
    server.weights["files"] = [HEAD | {"state": "there", "done": HEAD["size"]}, other]
    notice = page.locator(".pcpo-notice")
    expect(notice).to_contain_text("head.pth is there")
    expect(notice).to_contain_text("It is in models/reward_models.")


def test_why_nothing_can_be_downloaded_is_said(show, server):
    why = "Downloads are off, as the environment variable PCPO_DOWNLOADS says."
    unknown = HEAD | {"key": "hps", "name": "hps.pt", "refusal": "This pack knows no checksum."}
    server.weights = {"files": [HEAD, unknown], "off": why}
    page = show()
    named(page, "Weights").click()
    expect(page.locator(".pcpo-job:visible .pcpo-message").first).to_have_text(why)
    load = page.locator(".pcpo-file", has_text="head.pth").get_by_role("button")
    expect(load).to_have_attribute("aria-disabled", "true")
    load.click(force=True)
    row = page.locator(".pcpo-file", has_text="hps.pt")
    expect(row).to_contain_text("This pack knows no checksum.")
    expect(row.get_by_role("button")).to_have_count(0)
    assert not server.posts()


def test_a_job_that_failed_for_missing_weights_offers_them(open_job, server):
    server.weights = {"files": [HEAD, HEAD | {"key": "b", "name": "b", "rewards": ["other"]}],
                      "off": None}  # fmt: skip
    chosen = job(state="failed", message="the reward 'aesthetic' needs head.pth")
    chosen["config"]["rewards"] = {"beauty": {"name": "aesthetic", "weight": 1.0}}
    page = open_job(chosen)
    lack = part(page, "Missing weights")
    expect(lack.locator(".pcpo-file")).to_have_count(1)
    named(lack, "Download 3.71 MB").click()
    eventually(lambda: [post[1] for post in server.posts()] == [POSTED + "download"], page)


def test_a_node_that_lacks_weights_leads_to_their_page(show, server):
    server.weights = {"files": [HEAD], "off": None}
    page = show()
    text = "the head is missing; or press Download on the page Weights of the PCPO tab"
    detail = {"node_type": "PCPOReward", "exception_message": text}
    page.evaluate("said => fixture.say('execution_error', said)", detail)
    named(page.locator(".pcpo-notice"), "Open panel").click()
    expect(page.locator(".pcpo-file")).to_contain_text("head.pth")


# --- languages ---------------------------------------------------------------------------------


def test_the_panel_is_drawn_in_comfyuis_language_and_anew_when_that_changes(show, server):
    server.jobs = [job()]
    server.words = {"fr": {"Training jobs": "Entraînements", "training": "en cours"}}
    page = show("locale=fr")
    heading = page.locator(".pcpo h2").first
    expect(heading).to_have_text("Entraînements")
    expect(page.locator(".pcpo-card .pcpo-badge")).to_have_text("en cours")
    expect(named(page, "Taste")).to_be_visible()  # what lacks is English
    page.evaluate("fixture.set('Comfy.Locale', 'en')")
    expect(heading).to_have_text("Training jobs")
    expect(page.locator(".pcpo-card .pcpo-badge")).to_have_text("training")
    expect(page.locator(".pcpo")).to_have_count(2)  # the panel and the notices
    say(page, server)
    page.evaluate("fixture.set('Comfy.Locale', 'fr')")
    expect(heading).to_have_text("Entraînements")


BEYOND = """() => {
    const panel = document.querySelector("#sidebar > .pcpo");
    const edge = panel.getBoundingClientRect().right - 4;
    const scrolls = (element) => element !== panel
      && (getComputedStyle(element).overflowX !== "visible" || scrolls(element.parentElement));
    return [...panel.querySelectorAll("*")].filter((each) => each.checkVisibility()
      && !scrolls(each.parentElement) && !each.closest("svg, .pcpo-unseen")
      && (each.getBoundingClientRect().right > edge
        || (each.scrollWidth > each.clientWidth + 1 && each.clientWidth > 0
          && getComputedStyle(each).overflowX === "visible")))
      .map((each) => `${each.tagName} ${each.className} ${each.textContent.slice(0, 60)}`);
}"""


def test_long_words_stay_within_a_narrow_panel(show, server):
    server.words = {"de": longer()}
    server.jobs = [job(i, state) for i, state in enumerate(STATES, 1)]
    server.jobs[0]["name"] = "a name of many words, some_of_them_very_long_and_without_a_space"
    told = f"What arrived is another file than the one published: its sha256 is {'0' * 64}."
    names = {"name": "a_long_name-1.0_compressed.safetensors", "message": told}
    loading = HEAD | {"key": "b", "state": "loading", "done": 9}
    server.weights = {"files": [HEAD, loading, HEAD | names | {"key": "c", "state": "wrong"}],
                      "off": "Downloads are off, as the environment variable PCPO_DOWNLOADS "
                      "says."}  # fmt: skip
    server.tastes = taste_of
    page = show("locale=de&width=300px", width=700)
    expect(page.locator(".pcpo-card")).to_have_count(len(STATES))
    assert page.evaluate(BEYOND) == []
    nav = page.locator(".pcpo-nav button")
    for place, seen in ((1, ".pcpo-ways"), (2, ".pcpo-file")):
        nav.nth(place).click()
        expect(page.locator(seen).first).to_be_visible()
        assert page.evaluate(BEYOND) == []
    nav.nth(0).click()
    for number in range(len(STATES)):
        page.locator(".pcpo-card button").nth(number).click()
        expect(page.locator(".pcpo-job:visible:not(.pcpo-waiting)")).to_have_count(1)
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        assert page.evaluate(BEYOND) == []
        page.locator(".pcpo-back").click()


def taste_of(method: str, below: str, _: dict) -> tuple[int, dict]:
    """A taste without pictures."""
    if below:
        return 200, {"name": "warm", "votes": 0, "images": 0, "waiting": 0, "offers": 0, "last": [],
                "said": ["it was not fitted yet"], "knows": [], "head": None, "first": [],
                "curve": []}  # fmt: skip
    return 200, {"tastes": [{"name": "warm", "votes": 0, "waiting": 0, "folder": "/x"}]}


def test_a_language_without_words_is_english(show, server):
    server.jobs = [job()]
    page = show("locale=tr")
    expect(page.locator(".pcpo h2").first).to_have_text("Training jobs")
    assert page.evaluate("fixture.tabs[0].tooltip") == "PCPO training"


# --- pure logic --------------------------------------------------------------------------------


def test_thinning_keeps_ends_and_what_must_stay(show):
    body = "return m.thin(Array.from({ length: 1000 }, (_, i) => i), 10, (i) => i % 300 === 1)"
    found = in_module(show(), "panel_state", body)
    assert (found[0], found[-1]) == (0, 999)
    assert {1, 301, 601, 901} <= set(found)
    assert found == sorted(found)
    assert 10 <= len(found) <= 14


def test_spans_of_time(show):
    spans = {0: "0 sec", 89: "89 sec", 90: "2 min", 5400: "1 hr 30 min", 86400: "24 hr 0 min",
             864000: "10 days", None: "", -1: ""}  # fmt: skip
    found = in_module(show(), "panel_text", "return a.map(m.duration)", list(spans))
    assert found == list(spans.values())


def test_details_of_another_job_are_not_taken(show):
    body = """
        const open = m.opened(m.initial(), "b");
        return [m.withDetail(open, { id: "a" }).detail, m.withDetail(open, { id: "b" }).detail];
    """
    assert in_module(show(), "panel_state", body) == [None, {"id": "b"}]


def test_changes_of_state_are_read_out_and_progress_is_not(show):
    before = [{"id": "1", "name": "x", "state": "running", "iteration": 1}]
    moved = [before[0] | {"iteration": 2}]
    ended = [before[0] | {"state": "done"}, {"id": "2", "name": "new", "state": "queued"}]
    body = "return a.map(([b, c]) => m.announcement(b, c))"
    found = in_module(
        show(), "panel_state", body, [[before, moved], [before, ended], [None, ended]]
    )
    assert found == ["", "x: finished", ""]


def test_every_failure_is_one_sentence(show):
    cases = [[409, {"error": "It is done."}], [404, None], [500, {"error": 3}]]
    body = "return a.map(([s, b]) => m.failure(s, b))"
    said, missing, other = in_module(show(), "panel_state", body, cases)
    assert said == "It is done."
    assert "restart" in missing
    assert "500" in other


def test_a_job_is_chosen_by_its_name_where_that_is_its_own(show):
    jobs = [{"id": "1", "name": "x"}, {"id": "2", "name": "y"}, {"id": "3", "name": "x"}]
    found = in_module(show(), "panel_state", "return a.map((job) => m.jobChoice(job, a))", jobs)
    assert found == ["1", "y", "3"]


def test_calls_are_spaced_and_the_last_is_not_lost(show):
    body = """
        const at = [];
        const task = m.paced(() => at.push(performance.now()), 200);
        for (let i = 0; i < 50; i++) { task(); await new Promise((go) => setTimeout(go, 10)); }
        const before = performance.now();
        task();
        await new Promise((go) => setTimeout(go, 300));
        return { gaps: at.slice(1).map((t, i) => t - at[i]), late: at.at(-1) > before };
    """
    found = in_module(show(), "panel_state", body)
    assert found["gaps"]
    assert min(found["gaps"]) >= 195
    assert found["late"]


def test_curves_are_those_that_were_measured(show):
    lines = [line(i) | {"kl": 0.0, "frac_reward_zero_std": 0.0} for i in range(1, 1001)]
    body = "return m.curves(a)"
    given = {"metrics": lines, "before": 0.4, "config": {"method": {"clip_high": 1e-3}}}
    page = show()
    charts = {chart["title"]: chart for chart in in_module(page, "panel_curves", body, given)}
    assert "KL to the reference" not in charts  # 0 throughout: none was asked for
    assert not [title for title in charts if "equal rewards" in title]
    mean, held = charts["Reward"]["series"]
    assert mean["x"] == [*range(1, 1001)]  # thinned by the server, which keeps the peaks
    assert held["x"] == [0, *range(6, 1001, 6)]
    assert mean["high"][-1] == pytest.approx(lines[-1]["reward"] + lines[-1]["reward_std"])
    assert in_module(page, "panel_curves", body, {}) == []


def test_what_a_long_job_leaves_out_is_said(open_job):
    page = open_job(job(1, "done", measured={"count": 100_000, "width": 64}, sampled=10_001))
    said = "Thinned: 12 of 100000 iterations are drawn; of every 64, each curve"
    expect(page.get_by_text(said)).to_be_visible()
    expect(page.get_by_text("3 of 10001 sampled iterations are shown")).to_be_visible()


def test_a_short_job_leaves_nothing_out(open_job):
    page = open_job(job(1, "done", measured={"count": 12, "width": 1}, sampled=3))
    expect(page.get_by_text("Thinned")).to_have_count(0)
    expect(page.get_by_text("sampled iterations")).to_have_count(0)


def test_several_rewards_have_curves_of_their_own(show):
    lines = [line(i) | {"reward_scene": 0.5, "reward_ocr": i / 9} for i in range(1, 4)]
    scaled = {"weight": 1, "normalise": "z_score"}
    many = [{"scene": 1, "ocr": 2}, {"scene": scaled}, {"scene": 1}, {"scene": {"weight": 2}}]
    body = "return a[0].map((rewards) => m.curves({ metrics: a[1], config: { rewards } }))"
    found = in_module(show(), "panel_curves", body, [many, lines])
    titles = [[c["title"] for c in charts if c["title"].startswith("Reward ")] for charts in found]
    assert titles == [["Reward scene", "Reward ocr"], ["Reward scene"], [], []]
    (own,) = next(chart for chart in found[0] if chart["title"] == "Reward ocr")["series"]
    assert own["y"] == [i / 9 for i in range(1, 4)]


GUARD = {
    "rule": "The guard looks every 3 iterations.",
    "said": "iteration 6 is within the guard's bounds",
    "ended": False,
    "values": {
        "guard_diversity": {"name": "pixel diversity", "start": 0.4, "bound": 0.2},
        "guard_drift": {"name": "drift in pixels", "start": 0.0, "bound": None},
    },
}


def test_a_guard_has_curves_from_the_base_on(show):
    looks = {i: {"guard_reward": 0.5, "guard_diversity": 0.4 - i / 60} for i in (3, 6)}
    lines = [line(i) | looks.get(i, {}) for i in range(1, 8)]
    page, body = show(), "return m.curves(a)"
    charts = in_module(page, "panel_curves", body, {"metrics": lines, "guard": GUARD})
    first, second = (chart for chart in charts if chart["title"].startswith("Guard: "))
    values, bound = first["series"]
    assert (first["title"], values["x"]) == ("Guard: pixel diversity", [0, 3, 6])
    assert values["y"] == pytest.approx([0.4, 0.35, 0.3]) and bound["y"] == [0.2] * 3
    assert [each["name"] for each in second["series"]] == ["held-out prompts"]
    for other in ({"metrics": lines}, {"metrics": lines[:2], "guard": GUARD}):
        assert "Guard" not in str(in_module(page, "panel_curves", body, other))


def test_curves_for_engineers_are_folded(open_job):
    page = open_job()
    shown = page.locator(".pcpo-charts").first
    expect(shown.locator("figcaption")).to_have_text(["Reward"])
    more = page.locator("details", has=page.get_by_text("More curves", exact=True)).last
    expect(more.get_by_text("Clip fraction")).to_be_hidden()
    more.get_by_text("More curves").click()
    expect(more.get_by_text("Clip fraction")).to_be_visible()
    expect(more.locator("figcaption", has_text="Reward")).to_have_count(0)
    titles = page.locator("details.pcpo-part:visible > summary").all_inner_texts()
    assert titles[:2] == ["Curves", "Samples"]


def test_a_finished_job_says_its_lora_first(open_job, server):
    page = open_job(job(1, "done", publish="C:\\ComfyUI\\models\\loras\\my style.safetensors"))
    line = page.locator(".pcpo-lora")
    expect(line).to_have_text("LoRA my style.safetensors Copy name")
    assert line.evaluate("l => l.nextElementSibling.classList.contains('pcpo-head')")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    named(page, "Copy name").click()
    expect(page.locator(".pcpo-note")).to_have_text("The name was copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "my style.safetensors"
    server.jobs[0]["state"] = "running"
    say(page, server)
    expect(line).to_be_hidden()


def test_a_guard_says_its_rule_and_what_it_saw(open_job):
    page = open_job(job(guard=GUARD))
    expect(page.get_by_text(f"{GUARD['rule']} Now: {GUARD['said']}.")).to_be_visible()


def test_a_reward_in_words(show):
    found = in_module(
        show(),
        "panel_text",
        "return Object.entries(a).map(m.reward)",
        {
            "scene": 1,
            "ocr": -0.5,
            "jpeg_2": {"weight": 2, "name": "jpeg", "normalise": "affine", "scale": 0.5,
                       "shift": -3, "options": {"quality": 50}},
            "hps": {"weight": 1.0, "name": None, "normalise": "z_score", "scale": 1, "shift": 0,
                    "options": {"weights": "C:\\models\\HPS.pt", "folders": ["/m"], "x": None}},
            "remote": {"options": {"url": "http://10.0.0.2:8765"}},
        },
    )  # fmt: skip
    assert found == [
        "scene",
        "ocr × -0.5",
        "jpeg_2 × 2 (jpeg, 0.5 × score − 3, quality 50)",
        "hps (z-score, weights HPS.pt)",
        "remote (url http://10.0.0.2:8765)",
    ]


def test_settings_that_are_not_known_are_left_out(show):
    body = "return [m.settings(a), m.settings({}), m.allSettings(null)]"
    told = {"config": {"rewards": {"scene": 1.0, "other": 0.5}, "run": {"seed": 0}},
            "settings": {"on_server_exit": "save_and_stop", "pause_while_busy": True}}  # fmt: skip
    few, none, empty = in_module(show(), "panel_text", body, told)
    assert dict(few) == {"Rewards": "scene, other × 0.5", "Seed": "0", "When ComfyUI closes":
                         "saves and stops", "While ComfyUI is busy": "pauses"}  # fmt: skip
    assert (none, empty) == ([], [])


def test_modules_do_nothing_when_they_are_imported(show, server):
    page = show("hidden")
    assert page.evaluate("fixture.tabs.length") == 1
    assert not server.asked  # nothing is read before the tab is shown
    assert page.evaluate("document.getElementById('sidebar').childNodes.length") == 0
    assert page.locator("link[rel=stylesheet]").count() == 1


# --- the list ----------------------------------------------------------------------------------


def test_an_empty_list_teaches(show):
    page = show()
    expect(page.locator(".pcpo-empty")).to_contain_text("03 Train a LoRA")
    named(page, "Browse templates").click()
    assert page.evaluate("fixture.commands") == ["Comfy.BrowseTemplates"]


def test_every_state_has_a_name_and_says_what_it_means(show, server):
    server.jobs = [job(i, state) for i, state in enumerate(STATES, 1)]
    server.jobs[1].update(iteration=0)
    server.jobs.append(job(99, "dreaming"))  # of a newer version
    page = show()
    expect(page.locator(".pcpo-card")).to_have_count(len(STATES) + 1)
    labels = page.locator(".pcpo-card .pcpo-badge").all_inner_texts()
    assert len(set(labels)) == len(labels)
    assert labels[-1] == "dreaming"
    silent = {"running", "done"}
    for state, card in zip(STATES, page.locator(".pcpo-card").all(), strict=False):
        assert card.locator(".pcpo-message").is_visible() == (state not in silent), state
    bar = page.get_by_role("progressbar").nth(2)
    assert bar.get_attribute("aria-valuenow") == "20"
    assert bar.get_attribute("aria-valuetext") == "Iteration 12 of 60, about 7 min left"
    unknown = page.get_by_role("progressbar").nth(1)
    assert unknown.get_attribute("aria-valuenow") is None


def test_the_worker_s_own_sentence_comes_first(show, server):
    said = "The reward server did not answer within 60 s; start it and resume."
    server.jobs = [job(1, "failed", message=said), job(2, "stopping", message="from before")]
    page = show()
    expect(page.locator(".pcpo-message").first).to_have_text(said)
    expect(page.locator(".pcpo-card .pcpo-message").last).to_contain_text(
        "finished iteration is saved"
    )


def test_a_new_job_does_not_move_the_focus(show, server):
    server.jobs = [job(1), job(2)]
    page = show()
    named(page, "scenes_2").focus()
    server.jobs = [job(3), job(2)]  # one more, and one is gone
    say(page, server)
    expect(page.locator(".pcpo-open")).to_have_text(["scenes_3", "scenes_2"])
    expect(named(page, "scenes_2")).to_be_focused()


# --- asking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_what_can_be_asked_for_in_a_state(open_job, state):
    page = open_job(job(1, state))
    row = page.get_by_role("group", name="actions")
    usable = row.locator("button:visible:not([aria-disabled])").all_inner_texts()
    assert set(usable) == OFFERED[state] | ALWAYS
    for made in row.locator("button:visible[aria-disabled]").all():
        assert made.get_attribute("title")  # why not


@pytest.mark.parametrize(
    ("state", "text", "action", "then"),
    [
        ("running", "Pause", "pause", "pausing"),
        ("paused", "Continue", "continue", "training"),
        ("running", "Stop after this iteration", "stop", "stopping"),
        ("running", "Stop now", "stop_now", "stopping"),
        ("stopping", "Stop now", "stop_now", "stopping"),
        ("running", "Sample now", "sample", "training"),
        ("stopped", "Resume training", "resume", "waiting"),
    ],
)
def test_a_button_asks_the_server(open_job, server, state, text, action, then):
    page = open_job(job(1, state))
    named(page, text).click()
    expect(page.locator(".pcpo-job .pcpo-badge")).to_have_text(then)
    expect(page.locator(".pcpo-note")).to_be_visible()
    assert server.posts() == [("POST", f"{FIRST}/{action}", JSON, "{}")]


def test_the_focus_stays_where_one_button_takes_the_place_of_another(open_job):
    page = open_job()
    named(page, "Pause").press("Enter")
    expect(named(page, "Continue")).to_be_focused()


def test_buttons_come_back_whatever_the_order_of_the_answers(open_job, server):
    page = open_job()
    held = []
    page.route(f"**{FIRST}", lambda route: held.append(route))
    page.route(f"**{FIRST}/pause", lambda route: held.insert(0, route))
    named(page, "Pause").click()
    eventually(lambda: bool(held), page)
    server.jobs[0]["state"] = "pausing"
    say(page, server)  # has the details read while the request is under way
    eventually(lambda: len(held) == 2, page)
    held[0].continue_()
    page.wait_for_timeout(300)
    held[1].continue_()
    page.wait_for_timeout(300)
    expect(named(page, "Continue")).not_to_have_attribute("aria-disabled", "true")
    page.unroute_all()
    named(page, "Continue").click()
    expect(page.locator(".pcpo-job .pcpo-badge")).to_have_text("training")
    for text in ("Pause", "Stop after this iteration", "Sample now"):
        expect(named(page, text)).not_to_have_attribute("aria-disabled", "true")


def test_a_double_click_does_not_take_back_what_it_asked_for(open_job, server):
    page = open_job()
    named(page, "Pause").dblclick()
    named(page, "Continue").dispatch_event("click", {"detail": 2})  # where it stands there by then
    expect(page.locator(".pcpo-job .pcpo-badge")).to_have_text("pausing")
    page.wait_for_timeout(300)
    assert [path for _, path, _, _ in server.posts()] == [f"{FIRST}/pause"]


def test_a_key_that_is_held_down_asks_once(open_job, server):
    page = open_job()
    named(page, "Pause").focus()
    for _ in range(8):
        page.keyboard.down("Enter")  # again without up: the key repeats
        page.wait_for_timeout(80)
    page.keyboard.up("Enter")
    page.wait_for_timeout(300)
    assert [path for _, path, _, _ in server.posts()] == [f"{FIRST}/pause"]


def test_the_focus_is_not_lost_with_a_question_that_no_longer_fits(open_job, server):
    page = open_job(job(1, "stopped"))
    named(page, "Delete …").click()
    expect(named(page, "Keep")).to_be_focused()
    server.jobs[0]["state"] = "running"  # resumed by somebody else
    say(page, server)
    expect(page.get_by_role("alertdialog")).to_be_hidden()
    expect(page.get_by_text("Delete …")).to_be_focused()


def test_a_part_that_cannot_be_drawn_costs_no_other(open_job):
    odd = job(1, "done", samples=[None, {"iteration": 1, "count": 3, "scores": 3}], exports=["x"])
    page = open_job(odd | {"metrics": [None, {"iteration": 1}]})
    expect(part(page, "Files")).to_contain_text("x")
    part(page, "Log").locator("summary").click()
    expect(page.locator(".pcpo pre")).to_contain_text("iteration 12")
    named(page, "← All jobs").click()
    expect(named(page, "scenes_1")).to_be_focused()


def test_a_button_that_cannot_be_used_asks_nothing(open_job, server):
    page = open_job()
    page.get_by_text("Delete …").dispatch_event("click")
    page.get_by_text("Delete …").press("Enter")
    assert page.get_by_role("alertdialog").count() == 0
    assert not server.posts()


def test_delete_asks_in_place(open_job, server):
    page = open_job(job(1, "done"))
    dialog = page.get_by_role("alertdialog")
    for leave in (lambda: page.keyboard.press("Escape"), lambda: named(page, "Keep").click()):
        named(page, "Delete …").click()
        expect(named(page, "Keep")).to_be_focused()
        expect(dialog).to_contain_text("scenes_1")
        leave()
        expect(dialog).to_be_hidden()
        expect(named(page, "Delete …")).to_be_focused()
    assert not server.posts()
    named(page, "Delete …").click()
    named(page, "Delete").click()
    expect(page.locator(".pcpo-empty")).to_be_visible()
    assert server.posts() == [("POST", f"{FIRST}/delete", JSON, "{}")]
    assert page.evaluate("document.activeElement.tagName") == "H2"  # not lost


def test_the_loader_comes_into_the_graph_with_its_job(open_job, server):
    page = open_job()
    page.evaluate("fixture.choices.push('newest job')")  # a list that is older than the job
    named(page, "Add Load Job LoRA to graph").click()
    expect(page.locator(".pcpo-note")).to_contain_text("to the graph")
    node = page.evaluate("fixture.nodes[0]")
    assert node["type"] == "PCPOLoadJobLora"
    assert node["widgets"][0]["value"] == "scenes_1"
    assert node["pos"] == [1300, 2200]  # within what is seen
    assert page.evaluate("fixture.choices") == ["newest job", "scenes_1"]
    server.jobs.append(job(2, name="scenes_1"))
    say(page, server)
    named(page, "Add Load Job LoRA to graph").click()
    page.wait_for_function("fixture.nodes.length === 2")
    assert page.evaluate("fixture.nodes[1].widgets[0].value") == f"{1:016x}"
    page.evaluate("fixture.missing = 'PCPOLoadJobLora'")
    named(page, "Add Load Job LoRA to graph").click()
    expect(page.get_by_role("alert")).to_contain_text("restart")


def test_the_folder_is_copied_or_selected_to_be_copied(open_job):
    page = open_job(permissions=["clipboard-read", "clipboard-write"], height=400)
    named(page, "Copy folder path").click()
    expect(page.locator(".pcpo-note")).to_contain_text("copied")
    expect(page.locator(".pcpo-note")).to_be_in_viewport()  # though the panel is scrolled
    assert page.evaluate("navigator.clipboard.readText()").endswith(f"/{1:016x}")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    named(page, "Copy folder path").click()
    expect(page.get_by_role("alert")).to_contain_text("Ctrl+C")
    expect(page.get_by_role("alert")).to_be_in_viewport()
    assert page.evaluate("getSelection().toString()").endswith(f"/{1:016x}")


# --- while it trains ---------------------------------------------------------------------------


def test_an_update_changes_the_numbers_and_nothing_else(open_job, server):
    page = open_job(height=500)
    part(page, "Log").locator("summary").click()
    part(page, "Curves").locator("summary").first.click()
    slider = page.get_by_role("slider", name="how much")
    slider.fill("20")
    page.evaluate("""() => {
        fixture.kept = [...document.querySelectorAll('.pcpo button, .pcpo img, .pcpo input')];
        document.getElementById('sidebar').scrollTop = 300;
    }""")
    named(page, "Copy folder path").evaluate("made => made.focus({ preventScroll: true })")
    scrolled = page.locator("#sidebar").evaluate("made => made.scrollTop")
    assert scrolled > 0
    advance(server, 13)
    say(page, server)
    expect(page.locator(".pcpo-job .pcpo-head")).to_contain_text("Iteration 13 of 60")
    expect(page.locator(".pcpo pre")).to_contain_text("iteration 13")
    expect(named(page, "Copy folder path")).to_be_focused()
    assert slider.input_value() == "20"
    assert part(page, "Log").get_attribute("open") is not None
    assert part(page, "Curves").get_attribute("open") is None
    assert page.locator("#sidebar").evaluate("made => made.scrollTop") == pytest.approx(
        scrolled, abs=2
    )
    assert page.evaluate("fixture.kept.every((made) => made.isConnected)")


def test_the_curve_grows_and_keeps_the_focus_and_the_place(open_job, server):
    page = open_job()
    chart = page.get_by_role("img", name="Reward,")
    assert "iteration 0 to 12:" in chart.get_attribute("aria-label")
    chart.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    legend = page.locator(".pcpo-charts figure").first.locator("li").first
    expect(legend).to_have_text("iteration 1")
    advance(server, 13)
    say(page, server)
    expect(page.get_by_role("img", name="iteration 0 to 13:").first).to_be_focused()
    expect(legend).to_have_text("iteration 1")
    page.keyboard.press("ArrowRight")
    expect(legend).to_have_text("iteration 2")
    page.keyboard.press("Escape")
    expect(legend).to_have_text("iteration 13")


def test_a_burst_of_messages_reads_the_job_once_a_second(open_job, server):
    page = open_job()
    before, began = server.reads(FIRST), time.monotonic()
    for iteration in range(13, 43):
        advance(server, iteration)
        say(page, server)
        page.wait_for_timeout(50)
    eventually(lambda: "42" in (page.locator(".pcpo pre").text_content() or ""), page)
    assert server.reads(FIRST) - before <= time.monotonic() - began + 2


def test_a_panel_that_is_not_seen_reads_nothing(open_job, server):
    page = open_job()
    page.evaluate("document.getElementById('sidebar').replaceChildren()")
    before = server.reads(FIRST)
    advance(server, 13)
    say(page, server)
    page.wait_for_timeout(300)
    assert server.reads(FIRST) == before
    page.evaluate("fixture.show()")
    expect(page.locator(".pcpo-job .pcpo-head")).to_contain_text("Iteration 13 of 60")
    eventually(lambda: server.reads(FIRST) > before, page)


def test_the_end_of_a_job_is_shown_and_said(open_job, server):
    page = open_job()
    server.jobs[0].update(state="done", message="held-out reward 0.400 -> 0.620", iteration=60)
    say(page, server)
    expect(page.locator(".pcpo-job .pcpo-message")).to_have_text("held-out reward 0.400 -> 0.620")
    expect(page.locator(".pcpo-unseen")).to_have_text("scenes_1: finished")


# --- samples -----------------------------------------------------------------------------------


def test_samples_by_iteration_with_their_scores(open_job, server):
    page = open_job()
    grid, when = page.locator(".pcpo-grid"), page.get_by_role("slider", name="Fixed prompts")
    expect(grid.locator("img")).to_have_count(12)
    named(page, "Show all 16 prompts").click()
    expect(grid.locator("img")).to_have_count(16)
    assert when.get_attribute("aria-valuetext") == "iteration 12, mean reward 0.548"
    expect(grid.locator("span").first).to_have_text("0.360 ▲")
    when.fill("1")
    expect(grid.locator("span").first).to_have_text("0.330 ▲")
    first = grid.locator("img").first
    assert first.get_attribute("src") == f"{FIRST}/samples/6/0"
    assert first.get_attribute("alt") == "a red ball, iteration 6"
    assert first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    advance(server, 18)
    say(page, server)
    expect(page.locator(".pcpo-strip img")).to_have_count(4)
    expect(grid.locator("span").first).to_have_text("0.330 ▲")  # chosen by hand: it stays
    when.fill("3")
    advance(server, 24)
    say(page, server)
    expect(when).to_have_attribute("aria-valuetext", "iteration 24, mean reward 0.608")  # follows


def test_before_and_after_of_the_chosen_prompt(open_job):
    page = open_job()
    page.locator(".pcpo-grid button").nth(5).click()
    expect(page.locator(".pcpo-prompt")).to_have_text("a blue box")
    sources = [image.get_attribute("src") for image in page.locator(".pcpo-stage img").all()]
    assert sources == [f"{FIRST}/samples/{i}/5" for i in (0, 12)]
    expect(page.locator(".pcpo-ends")).to_contain_text("base model: 0.300")
    stage = page.locator(".pcpo-stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
    page.mouse.up()
    assert page.get_by_role("slider", name="how much").input_value() in ("24", "25", "26")
    clip = page.locator(".pcpo-stage img").last.evaluate("image => image.style.clipPath")
    assert clip.endswith(f"{page.get_by_role('slider', name='how much').input_value()}%)")
    page.locator(".pcpo-strip button").first.click()  # the base model alone
    expect(page.locator(".pcpo-stage img:visible")).to_have_count(1)


def test_a_job_without_any_result_yet(open_job):
    page = open_job(job(1, "preparing", 0, metrics=[], samples=[], exports=[], log=[]))
    for title, text in (
        ("Curves", "No iteration"),
        ("Samples", "No samples"),
        ("Files", "No LoRA"),
    ):
        expect(part(page, title)).to_contain_text(text)


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_refusal_of_the_server_is_one_line(open_job, server):
    page = open_job()
    server.broken[f"{FIRST}/pause"] = (409, {"error": "This job has ended; resume it."})
    named(page, "Pause").click()
    expect(page.get_by_role("alert").locator("span")).to_have_text("This job has ended; resume it.")
    del server.broken[f"{FIRST}/pause"]
    named(page, "Pause").click()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_comfyui_without_the_routes_says_so(show, server):
    server.has_routes = False
    page = show()
    expect(page.get_by_role("alert")).to_contain_text("restart it")
    assert not page.locator(".pcpo-empty").is_visible()
    server.has_routes = True
    named(page, "Try again").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator(".pcpo-empty")).to_be_visible()


def test_the_server_goes_away_and_comes_back(open_job, server):
    page = open_job()
    page.evaluate("fixture.say('reconnecting')")
    expect(page.locator(".pcpo-error")).to_contain_text("does not answer")
    expect(page.locator(".pcpo-head").last).to_contain_text(
        "Iteration 12"
    )  # the last that is known
    server.jobs[0].update(state="lost")
    page.evaluate("fixture.say('reconnected')")
    expect(page.locator(".pcpo-error")).to_be_hidden()
    expect(page.locator(".pcpo-job .pcpo-badge")).to_have_text("lost")


def test_a_network_that_fails_is_one_line(open_job):
    page = open_job()
    page.route("**/api/**", lambda route: route.abort())
    named(page, "Pause").click()
    expect(page.get_by_role("alert")).to_contain_text("does not answer")


def test_a_reload_opens_the_same_job(open_job):
    page = open_job()
    page.reload()
    expect(page.locator(".pcpo-job h2")).to_have_text("scenes_1")
    named(page, "← All jobs").click()
    expect(named(page, "scenes_1")).to_be_focused()
    page.reload()
    expect(page.locator(".pcpo-card")).to_be_visible()


def test_a_job_that_was_deleted_elsewhere(open_job, server):
    page = open_job()
    server.jobs = [job(2)]
    say(page, server)
    expect(page.locator(".pcpo-note")).to_contain_text("no longer there")
    expect(page.locator(".pcpo-open")).to_have_text(["scenes_2"])


def test_an_answer_that_a_message_overtook_is_dropped(show, server):
    server.jobs = [job(1)]
    page = show()
    expect(page.locator(".pcpo-card .pcpo-badge").first).to_have_text("training")
    held = []
    page.route("**/api/pcpo/jobs", lambda route: held.append(route))
    page.evaluate("fixture.say('reconnected')")
    eventually(lambda: bool(held), page)
    old = server.message()
    server.jobs[0]["state"] = "done"
    say(page, server)
    expect(page.locator(".pcpo-card .pcpo-badge").first).to_have_text("finished")
    held[0].fulfill(json=old)
    page.wait_for_timeout(300)
    expect(page.locator(".pcpo-card .pcpo-badge").first).to_have_text("finished")


def test_an_end_is_told_beside_the_panel_and_leads_to_it(show, server):
    server.jobs = [job(1), job(2)]
    page = show()
    expect(page.locator(".pcpo-card")).to_have_count(2)
    server.jobs[0].update(state="failed", message="The disk is full.")
    say(page, server)
    notice = page.locator(".pcpo-notice")
    expect(notice).to_contain_text("The disk is full.")
    notice.get_by_role("button", name="Open panel").click()
    expect(page.locator(".pcpo-job h2")).to_have_text(server.jobs[0]["name"])
    expect(notice).to_have_count(0)


def test_a_node_that_refuses_says_why_at_once(show, server):
    page = show()
    page.evaluate("""fixture.say('execution_error', { node_type: 'PCPOReward',
        exception_message: 'the reward needs a file\\n' })""")
    expect(page.locator(".pcpo-notice p")).to_have_text("The reward needs a file")
    page.evaluate(
        "fixture.say('execution_error', { node_type: 'KSampler', exception_message: 'x' })"
    )
    expect(page.locator(".pcpo-notice")).to_have_count(1)
    page.evaluate("fixture.say('pcpo.refused', { node_type: 'PCPOPrompts', text: 'no prompt' })")
    expect(page.locator(".pcpo-notice p").last).to_have_text("No prompt")


def test_rendering_again_is_the_same_panel(show, server):
    server.jobs = [job(1)]
    page = show()
    expect(page.locator(".pcpo-card")).to_have_count(1)
    before = server.reads("/api/pcpo/jobs")
    page.evaluate("fixture.show(); fixture.show();")
    assert page.locator("section.pcpo").count() == 1
    page.evaluate("""() => {
        const other = document.body.appendChild(document.createElement('div'));
        fixture.show(other);
        document.getElementById('sidebar').remove();
    }""")
    expect(page.locator(".pcpo-card")).to_have_count(1)
    eventually(lambda: server.reads("/api/pcpo/jobs") > before, page)
    assert server.reads("/api/pcpo/jobs") <= before + 2
    page.locator(".pcpo-card button").click()
    expect(page.locator(".pcpo-job h2")).to_be_visible()


def test_what_others_wrote_is_text(show, server):
    hostile = job(1, "failed", name=HOSTILE, message=HOSTILE, log=[HOSTILE], exports=[HOSTILE])
    hostile["config"]["rewards"] = {HOSTILE: 2.0}
    hostile["samples"][-1]["scores"][0]["prompt"] = HOSTILE
    server.jobs = [hostile]
    page = show()
    page.locator(".pcpo-card button").click()
    for title in ("Settings", "Log"):
        part(page, title).locator("summary").first.click()
    page.get_by_text("All settings").click()
    expect(page.locator(".pcpo-job h2")).to_have_text(HOSTILE)
    expect(page.locator(".pcpo-prompt")).to_have_text(HOSTILE)
    expect(page.locator(".pcpo pre")).to_have_text(HOSTILE)
    assert page.evaluate("fixture.harm") is None
    assert page.locator(".pcpo img[src=x], .pcpo script").count() == 0


# --- for everyone ------------------------------------------------------------------------------

CONTRAST = """() => {
    const pixel = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const rgb = (colours) => {
        pixel.clearRect(0, 0, 1, 1);
        for (const colour of colours) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
        return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (colour) => colour.map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const found = [];
    const walker = document.createTreeWalker(document.querySelector('.pcpo'), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !parent.checkVisibility()) continue;
        if (parent.closest('svg, [aria-disabled], .pcpo-unseen')) continue;
        const grounds = [];
        for (let at = parent; at; at = at.parentElement) {
            grounds.unshift(getComputedStyle(at).backgroundColor);
        }
        const back = light(rgb(grounds));
        const text = light(rgb([...grounds, getComputedStyle(parent).color]));
        const ratio = (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05);
        found.push([ratio, walker.currentNode.data]);
    }
    return found;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_and_can_be_read(show, server, theme, width):
    server.jobs = [job(i, state) for i, state in enumerate(STATES, 1)]
    server.jobs[2]["name"] = "a_name_without_any_space_" * 4
    page = show(f"theme={theme}&width={min(width, 400)}px", width=width)
    expect(page.locator(".pcpo-card")).to_have_count(len(STATES))

    def check() -> None:
        panel = page.locator("#sidebar")
        assert panel.evaluate("made => made.scrollWidth <= made.clientWidth")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 10
        assert min(ratios)[0] >= 4.5, min(ratios)

    check()
    page.locator(".pcpo-card button").nth(2).click()
    for title in ("Settings", "Log"):
        part(page, title).locator("summary").first.click()
    page.get_by_text("More curves").click()
    expect(page.locator(".pcpo-charts svg[role=img]")).to_have_count(6)
    check()
    for chart in page.locator(".pcpo-charts svg[role=img]").all():
        assert chart.bounding_box()["width"] <= min(width, 400)


def test_everything_is_reached_by_keyboard_with_a_name_and_an_outline(open_job):
    page = open_job()
    page.locator(".pcpo-job h2").focus()
    seen = []
    for _ in range(80):
        page.keyboard.press("Tab")
        at = page.evaluate("""() => {
            const made = document.activeElement;
            if (!made.closest('.pcpo')) return null;
            const { outlineStyle, outlineWidth } = getComputedStyle(made);
            const label = made.labels?.[0]?.textContent ?? '';
            const image = made.querySelector('img')?.alt ?? '';
            return { name: made.getAttribute('aria-label') || label || made.textContent + image,
                outline: outlineStyle !== 'none' && parseFloat(outlineWidth) >= 2 };
        }""")
        if at is None:
            break
        seen.append(at)
    names = " | ".join(each["name"] for each in seen)
    for wanted in (
        "Pause",
        "Delete",
        "Reward",
        "how much",
        "Fixed prompts",
        "Copy",
        "Log",
        "a red",
    ):
        assert wanted in names
    assert [each for each in seen if not each["outline"] or not each["name"].strip()] == []


def test_nothing_moves_where_that_is_not_wanted(show, server):
    server.jobs = [job(1, "preparing", of=None), job(2)]
    moving = """() => [...document.querySelectorAll('.pcpo *')]
        .map((made) => getComputedStyle(made))
        .filter((s) => s.animationName !== 'none' || parseFloat(s.transitionDuration) > 0).length"""
    for setting, is_moving in (("reduce", False), ("no-preference", True)):
        page = show(reduced_motion=setting)
        expect(page.locator(".pcpo-card")).to_have_count(2)
        assert bool(page.evaluate(moving)) == is_moving


def test_summaries_are_what_the_routes_tell(server):
    server.jobs = [job()]
    assert set(server.summaries()[0]) == set(SUMMARY)

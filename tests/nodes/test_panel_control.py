"""The panel's state without a page: answers that are late, overtake one another, or never come."""

from __future__ import annotations

from typing import Any

import panel_node_fixture
import pytest

A, B = "a" * 16, "b" * 16
START = """
    const job = (id, state, more = {}) => ({ id, name: id[0], state, iteration: 1, created: 1,
      ...more });
    const world = fake(a?.stored);
    const control = createControl(world.host, world.draw);
    const last = () => world.drawn.at(-1);
    const stateOf = (id) => last().jobs.find((each) => each.id === id)?.state ?? "gone";
    const A = "aaaaaaaaaaaaaaaa", B = "bbbbbbbbbbbbbbbb";
    const posts = () => world.asked.filter(({ method }) => method === "POST");
    const list = [job(A, "running"), job(B, "running")];
    control.receive({ jobs: list, at: 10 });
    await settled();
"""


@pytest.fixture
def run(tmp_path):
    def ran(body: str, argument: Any = None, start: str = START) -> Any:
        return panel_node_fixture.run(tmp_path, start + body, argument)

    return ran


# --- the case that a user sees -------------------------------------------------------------------


def test_buttons_come_back_when_details_arrive_after_the_answer(run):
    """Pause makes the details stale; they are read while the request's answer is dealt with."""
    found = run("""
        control.open(A);
        await world.of(`/pcpo/jobs/${A}`)[0].answer({ ...list[0], at: 11 });
        const asking = control.ask(A, "pause");
        await settled();
        const waiting = [...last().pending];
        control.receive({ jobs: [job(A, "pausing"), list[1]], at: 12 });  // reads the details
        await settled();
        await posts()[0].answer({ job: job(A, "pausing"), at: 13 });
        await asking;
        await settled();
        const late = world.of(`/pcpo/jobs/${A}`).at(-1);
        await late.answer({ ...job(A, "pausing"), at: 14 });
        return [waiting, last().pending, stateOf(A), states.openJob(last()).state];
    """)
    assert found == [[f"{A} pause"], [], "pausing", "pausing"]


def test_a_late_answer_brings_nothing_back_but_what_it_is_about(run):
    """Whatever happened while details were under way is still so afterwards."""
    found = run("""
        control.open(A);
        const details = world.of(`/pcpo/jobs/${A}`)[0];
        control.receive({ jobs: [job(A, "done"), job(B, "stopped")], at: 12 });
        await control.copy("x");
        await details.answer({ ...list[0], at: 11, log: ["of A"] });
        return [stateOf(A), stateOf(B), last().note, last().detail.log,
          states.openJob(last()).state];
    """)
    assert found == ["done", "stopped", "The path was copied.", ["of A"], "done"]


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("message_first", [True, False])
def test_of_an_answer_and_a_message_the_later_look_counts(run, message_first):
    """Both come by connections of their own, so that they overtake each other."""
    steps = [
        'await posts()[0].answer({ job: job(A, "pausing"), at: 20 });',
        'control.receive({ jobs: [job(A, "paused"), list[1]], at: 21 });',
    ]
    found = run(f"""
        const asking = control.ask(A, "pause");
        {" await settled(); ".join(reversed(steps) if message_first else steps)}
        await asking;
        await settled();
        return [stateOf(A), last().pending];
    """)
    assert found == ["paused", []]


def test_a_list_keeps_what_is_known_from_later(run):
    """A list that was made before an answer, and arrives after it."""
    found = run("""
        control.refresh();
        const [read] = world.of("/pcpo/jobs");
        const asking = control.ask(A, "stop");
        await posts()[0].answer({ job: job(A, "stopping"), at: 31 });
        await asking;
        await read.answer({ jobs: [job("c".repeat(16), "queued"), ...list], at: 30 });
        return [stateOf(A), stateOf("c".repeat(16)), last().jobs.length];
    """)
    assert found == ["stopping", "queued", 3]


def test_a_job_that_was_deleted_does_not_come_back(run):
    found = run("""
        control.open(A);
        const details = world.of(`/pcpo/jobs/${A}`)[0];
        control.refresh();
        const [read] = world.of("/pcpo/jobs");
        const asking = control.ask(A, "delete");
        await posts()[0].answer({ job: job(A, "deleted"), at: 31 });
        await asking;
        await details.answer({ ...list[0], at: 29 });
        await read.answer({ jobs: list, at: 30 });
        control.receive({ jobs: list, at: 12 });
        await settled();
        const gone = [stateOf(A), last().open, last().detail, last().loadError];
        control.receive({ jobs: [list[1]], at: 40 });
        await settled();
        return [...gone, stateOf(A), stateOf(B), last().note];
    """)
    assert found == ["gone", None, None, "", "gone", "running", "The job was deleted."]


def test_an_older_list_or_older_details_are_dropped(run):
    found = run("""
        control.receive({ jobs: [job(A, "paused")], at: 50 });
        control.receive({ jobs: list, at: 49 });
        let state = states.opened(states.initial(), A);
        state = states.withDetail(state, { ...job(A, "done"), at: 9 });
        state = states.withDetail(state, { ...job(A, "running"), at: 8 });
        await settled();
        return [stateOf(A), stateOf(B), state.detail.state];
    """)
    assert found == ["paused", "gone", "done"]


def test_details_that_are_newer_than_the_list_are_what_is_shown(run):
    found = run("""
        control.open(A);
        await world.of(`/pcpo/jobs/${A}`)[0].answer({ ...job(A, "done"), at: 60 });
        const newer = states.openJob(last()).state;
        control.receive({ jobs: [job(A, "queued")], at: 61 });
        await settled();
        return [newer, states.openJob(last()).state];
    """)
    assert found == ["done", "queued"]


def test_a_server_that_started_anew_may_count_from_below(run):
    found = run("""
        control.disconnected();
        control.reconnected();
        await world.of("/pcpo/jobs")[0].answer({ jobs: [job(A, "lost")], at: 1 });
        return [stateOf(A), stateOf(B), last().loadError];
    """)
    assert found == ["lost", "gone", ""]


# --- another job, or none ------------------------------------------------------------------------


def test_a_job_that_is_slow_does_not_hold_up_another(run):
    found = run("""
        control.open(A);
        control.close();
        control.open(B);
        await world.of(`/pcpo/jobs/${B}`)[0].answer({ ...list[1], at: 11 });
        const shown = last().detail.id;
        await world.of(`/pcpo/jobs/${A}`)[0].fail();
        return [shown, last().open, last().loadError];
    """)
    assert found == [B, B, ""]


def test_a_job_that_went_meanwhile_is_left_with_a_word(run):
    found = run("""
        control.open(A);
        await world.of(`/pcpo/jobs/${A}`)[0].answer({ error: "there is no job" }, 404);
        await world.of("/pcpo/jobs")[0].answer({ jobs: [list[1]], at: 12 });
        return [last().open, last().note, last().loadError];
    """)
    assert found == [None, "The open job is no longer there.", ""]


def test_what_was_asked_of_one_job_is_not_said_of_another(run):
    found = run("""
        control.open(A);
        const asking = control.ask(A, "pause");
        control.open(B);
        await posts()[0].answer({ job: job(A, "pausing"), at: 20 });
        await asking;
        await settled();
        return [last().note, stateOf(A), last().open];
    """)
    assert found == ["", "pausing", B]


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_second_click_asks_nothing(run):
    found = run("""
        const both = [control.ask(A, "pause"), control.ask(A, "pause"), control.ask(A, "stop")];
        control.ask(B, "pause");
        return [posts().map(({ route }) => route)];
    """)
    assert found == [[f"/pcpo/jobs/{A}/pause", f"/pcpo/jobs/{B}/pause"]]


@pytest.mark.parametrize(
    "how", ["fail()", 'answer({ error: "no" }, 409)', "answer(null, 500)", "answer(null)"]
)
def test_after_a_failure_buttons_can_be_used_and_the_jobs_are_read_anew(run, how):
    found = run(f"""
        const asking = control.ask(A, "pause");
        await posts()[0].{how};
        await asking;
        await world.of("/pcpo/jobs")[0].answer({{ jobs: [job(A, "pausing")], at: 12 }});
        return [last().pending, Boolean(last().actionError), stateOf(A)];
    """)
    assert found == [[], True, "pausing"]


def test_a_server_that_never_answers_is_given_up(run):
    found = run("""
        const usual = globalThis.setTimeout;
        globalThis.setTimeout = (task, ms) => usual(task, ms > 1000 ? 200 : ms);
        const asking = control.ask(A, "pause");
        await asking;
        globalThis.setTimeout = usual;
        await settled();
        return [last().pending, last().actionError];
    """)
    assert found[0] == [] and "does not answer" in found[1]


@pytest.mark.parametrize("what", ["draw", "storage"])
def test_a_page_that_cannot_draw_or_store_does_not_stop_the_panel(run, what):
    start = """
        const world = fake();
        if (a.what === "storage") for (const name of Object.keys(world.host.storage)) {
          world.host.storage[name] = () => { throw new Error("blocked"); };
        }
        let latest;
        const control = createControl(world.host, (state) => {
          latest = state;
          if (a.what === "draw") throw new Error("odd data");
        });
        console.error = () => {};
    """
    found = run(
        """
        control.receive({ jobs: [{ id: "x", name: "x", state: "running" }], at: 1 });
        control.open("x");
        const asking = control.ask("x", "pause");
        await world.asked.at(-1).answer({ job: { id: "x", state: "pausing" }, at: 2 });
        await asking;
        await settled();
        return [latest.pending, latest.jobs[0].state, latest.actionError];
        """,
        {"what": what},
        start,
    )
    assert found == [[], "pausing", ""]


def test_what_happened_while_the_panel_was_closed_is_drawn_when_it_opens(run):
    found = run("""
        world.host.shown = false;
        const asking = control.ask(A, "pause");
        await posts()[0].answer({ job: job(A, "pausing"), at: 20 });
        await asking;
        const count = world.drawn.length;
        world.host.shown = true;
        control.refresh();                       // its answer never comes
        await settled();
        return [world.drawn.length > count, stateOf(A), last().pending];
    """)
    assert found == [True, "pausing", []]


# --- several users -------------------------------------------------------------------------------


def test_a_message_without_jobs_has_the_list_read(run):
    """With --multi-user the server tells everybody that something changed, and nobody what."""
    found = run("""
        for (let i = 0; i < 20; i++) control.receive({ jobs: null });
        await settled();
        const count = world.of("/pcpo/jobs").length;
        await world.of("/pcpo/jobs")[0].answer({ jobs: [job(A, "done")], at: 12 });
        const shown = stateOf(A);
        world.host.shown = false;
        control.receive({ jobs: null });
        return [count, shown];
    """)
    assert found == [1, "done"]


# --- odd contents --------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [None, 3, "x", [], True])
def test_settings_of_any_shape_are_shown(run, section):
    names = ["model", "trainable", "sampler", "method", "rewards", "prompts", "optimizer", "run"]
    odd = [{"config": section, "settings": section}, {"config": dict.fromkeys(names, section)}]
    found = run("return a.map((job) => text.settings(job).length)", odd, "")
    assert len(found) == 2


# --- what is told wherever the user looks --------------------------------------------------------


def test_a_training_that_starts_ends_or_fails_is_told_once(run):
    found = run("""
        const started = job("c".repeat(16), "preparing");
        control.receive({ jobs: [...list, started], at: 11 });
        control.receive({ jobs: [job(A, "done", { before: 0.39, held_out: 0.79,
          publish: "C:\\\\loras\\\\my style.safetensors" }), list[1], started], at: 12 });
        control.receive({ jobs: [job(A, "done"), job(B, "failed", { message: "The disk is full." }),
          started], at: 13 });
        control.receive({ jobs: [job(A, "done"), job(B, "failed"), started], at: 14 });
        return world.told;
    """)
    assert [(told["id"][0], told["kind"]) for told in found] == [
        ("c", "started"),
        ("a", "finished"),
        ("b", "failed"),
    ]
    assert found[1]["title"] == "a has finished"
    assert "0.390 → 0.790" in found[1]["text"] and "my style.safetensors" in found[1]["text"]
    assert found[2]["text"] == "The disk is full."


def test_a_note_vanishes_unless_another_has_come(run):
    found = run("""
        const notes = [], usual = globalThis.setTimeout;
        globalThis.setTimeout = (f, ms) => (ms > 5000 ? notes.push(f) : usual(f, ms));
        await control.copy("a");
        await settled();
        const first = last().note;
        await control.copy("b", "The name was copied.");
        await settled();
        const second = last().note;
        notes.at(-1)();
        await settled();
        return [first, second, last().note, notes.length];
    """)
    assert found == ["The path was copied.", "The name was copied.", "", 2]


def test_a_notice_begins_with_a_capital_unless_a_name_does(run):
    said = ["the text holds no prompt", "of_sd15.safetensors is a LoRA", "nan, nothing", "été, fin"]
    found = ["The text holds no prompt", said[1], "Nan, nothing", "Été, fin"]
    assert run("return a.map(notices.sentenced);", said) == found


def test_jobs_that_were_there_before_the_page_are_no_news(run):
    assert run("return world.told;") == []
    assert run("return notices.news([], [job(A, 'done'), job(B, 'paused')]);") == []


def test_the_badge_counts_trainings_until_one_has_ended_unseen(run):
    found = run("""
        return [[], ["started"], ["finished"], ["finished", "failed"]]
          .map((unseen) => notices.badge(list, unseen)).concat(notices.badge(null, []));
    """)
    assert found == ["2", "2", "✓", "!", ""]


def test_a_node_says_how_its_job_goes(run):
    found = run("""
        return [job(A, "running", { iteration: 3, of: 40, eta_seconds: 300, reward: 0.5 }),
          job(A, "failed", { message: "Out of memory." })].map(text.nodeLine);
    """)
    assert found == [
        "training · Iteration 3 of 40, about 5 min left · Reward 0.500",
        "failed: Out of memory.",
    ]


def test_the_first_job_that_a_page_starts_is_news(run):
    found = run(
        """
        const world = fake();
        const control = createControl(world.host, world.draw);
        const reading = control.know();
        await world.asked[0].answer({ jobs: [{ id: "b", name: "old", state: "done" }], at: 1 });
        await reading;
        control.know();  // it is known
        const old = { id: "b", name: "old", state: "done" };
        const jobs = [{ id: "a", name: "mine", state: "preparing" }, old];
        control.receive({ jobs, at: 2 });
        return [world.asked.map(({ route }) => route), world.told.map(({ title }) => title)];
        """,
        start="",
    )
    assert found == [["/pcpo/jobs"], ["mine has started training"]]


# --- curves --------------------------------------------------------------------------------------


def test_a_taste_has_curves_of_its_distance_and_of_new_votes(run):
    lines = [
        {"iteration": i, "distance_mine": 0.5 * i, "outside_mine": i / 4, "votes_mine": votes}
        for i, votes in ((1, 40), (2, 40), (3, 44))
    ]
    body = """
        const { tasteCurves } = await import("./taste_curves.js");
        const { curves } = await import("./panel_curves.js");
        return [tasteCurves(a.lines), tasteCurves(a.lines.slice(0, 2)), tasteCurves([{}]),
          curves({ metrics: a.lines }).map(({ title }) => title)];"""
    both, quiet, none, shown = run(body, {"lines": lines}, "")
    distance, votes = both
    assert distance["title"] == "Distance from the pictures voted on (mine)"
    assert [each["y"] for each in distance["series"]] == [
        [0.5, 1.0, 1.5],
        [0.25, 0.5, 0.75],
        [1, 1, 1],
    ]
    assert (votes["title"], votes["series"][0]["y"]) == ("Votes (mine)", [40, 40, 44])
    assert [chart["title"] for chart in quiet] == [distance["title"]]  # none came meanwhile
    assert none == [] and {distance["title"], votes["title"]} <= {*shown}

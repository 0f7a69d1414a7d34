/** The page Taste: choose, make or delete a taste, what it knows, and the way to its stage. */

import { lineChart } from "./charts.js";
import { votesLine } from "./ballot.js";
import { createConfirm, isUsable, setUsable } from "./panel_confirm.js";
import { button, createPart, keyed, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { told } from "./words_of_server.js";
import { mark, plural, t } from "./words.js";

const ABOUT = mark("A taste learns what you like: you choose between two pictures, some dozens of times, and a training can use it as its reward. Nothing leaves this machine.");
const SOURCES = [mark("press “Rate this job’s samples” on the page of a job;"),
  mark("put the node PCPO Rate Images after your images;"),
  mark("or let a training ask while it runs (Ask for votes every, in PCPO Training Settings).")];
const WORDS = { left: mark("left"), right: mark("right"), tie: mark("equally good"),
  neither: mark("neither is good") };
const PICTURES = { left: mark("left picture"), right: mark("right picture") };
const ENDS = { first: mark("Liked best"), last: mark("Liked least") };

/** @param {object} control of taste_control.js. */
export function createTastePage(control) {
  const title = make("h2", { tabindex: -1 }, t("Taste"));
  const chooser = createChooser(control);
  const vote = button("", () => isUsable(vote) && control.vote(), { class: "pcpo-main" });
  const count = make("p", { class: "pcpo-soft" });
  const said = make("ul", { class: "pcpo-said" });
  const howTo = createHowTo();
  const parts = [createCurve(), createRanking(control), createVotes(control)];
  const remove = createRemove(control);
  const known = make("div", { class: "pcpo-job" }, make("div", { class: "pcpo-actions" }, vote),
    count, said, howTo, ...parts.map(({ element }) => element), remove.element);
  const element = make("div", { class: "pcpo-job" }, title, chooser.element, known);
  return {
    element,
    focus: () => title.focus(),
    update(state) {
      const { seen } = state;
      chooser.update(state);
      known.hidden = !seen;
      if (!seen) return;
      const canVote = seen.waiting > 0 || seen.offers > 1;
      setText(vote, seen.waiting ? plural("Vote on {count} pair", "Vote on {count} pairs", seen.waiting)
        : t("Vote"));
      setUsable(vote, canVote && !state.busy, t("There are no two pictures to choose from yet."));
      setText(count, votesLine(seen));
      said.hidden = !seen.votes;
      keyed(said, seen.said.map((text, i) => ({ text: told(text), i })), ({ i }) => i, () => {
        const line = make("li");
        return { element: line, update: ({ text }) => setText(line, text) };
      });
      howTo.hidden = canVote;
      for (const part of parts) part.update(state);
      remove.update(state);
    },
  };
}

/** Which taste, and a form for a new one. */
function createChooser(control) {
  const about = make("p", {}, t(ABOUT));
  const choice = make("select", { "aria-label": t("taste") });
  choice.addEventListener("change", () => control.choose(choice.value));
  const open = button(t("New …"), () => show(true), { class: "pcpo-small" });
  const name = make("input", { type: "text", maxlength: 80, id: "pcpo-taste-name" });
  const make_ = make("button", { type: "submit", class: "pcpo-main" }, t("Make"));
  const cancel = button(t("Cancel"), () => show(false));
  const form = make("form", { class: "pcpo-new", hidden: "" },
    make("label", { for: name.id }, t("Name of the new taste")),
    make("div", { class: "pcpo-row" }, name, make_, cancel));
  const row = make("div", { class: "pcpo-row" }, choice, open);
  let isAsked = false;
  let tastes = null;
  function show(isShown) {
    isAsked = isShown;
    redraw();
    (isShown ? name : open).focus();
  }
  function redraw() {
    row.hidden = !tastes?.length;
    about.hidden = !tastes || tastes.length > 0;
    form.hidden = !tastes || (!isAsked && tastes.length > 0);
    cancel.hidden = !tastes?.length;
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!(await control.create(name.value))) return;
    name.value = "";
    show(false);
  });
  form.addEventListener("keydown", (event) => event.key === "Escape" && tastes?.length && show(false));
  function update(state) {
    tastes = state.tastes;
    redraw();
    keyed(choice, tastes ?? [], (taste) => taste.name, () => {
      const option = make("option");
      return { element: option, update: (taste) => {
        option.value = taste.name;
        setText(option, taste.name);
      } };
    });
    if (state.name !== null && choice.value !== state.name) choice.value = state.name;
  }
  return { element: make("div", { class: "pcpo-job" }, about, row, form), update };
}

function createHowTo() {
  return make("div", { class: "pcpo-empty", hidden: "" },
    make("p", {}, t("It has no pictures to choose from yet. To give it some:")),
    make("ul", { class: "pcpo-ways" }, ...SOURCES.map((text) => make("li", {}, t(text)))));
}

// ---- what it knows ------------------------------------------------------------------------------

function createCurve() {
  const place = make("div", { class: "pcpo-charts" }, make("div"));
  const element = createPart(t("Agreement"), [place]);
  let drawn = "";
  const update = ({ seen }) => {
    const curve = seen.curve ?? [];
    element.hidden = curve.length < 2;
    if (element.hidden || drawn === JSON.stringify(curve)) return;
    drawn = JSON.stringify(curve);
    const x = curve.map(([votes]) => votes);
    lineChart(place.firstElementChild, { title: t("Random pairs on which it agrees with you"),
      xLabel: t("votes"), yLabel: t("share"), yRange: [0, 1], height: 180, series: [
        { name: t("agrees"), x, y: curve.map(([, share]) => share), style: { points: true } },
        { name: t("chance"), x, y: x.map(() => 0.5), style: { dash: "3 3" } }] });
  };
  return { element, update };
}

function createRanking(control) {
  const ends = Object.entries(ENDS).map(([end, text]) =>
    [end, make("p", { class: "pcpo-soft" }, t(text)),
      make("ul", { class: "pcpo-strip", "aria-label": t(text) })]);
  const element = createPart(t("Pictures as it ranks them now"), ends.flatMap(([, ...made]) => made));
  const update = ({ ranking }) => {
    element.hidden = !ranking?.first.length;
    if (element.hidden) return;
    for (const [end, , strip] of ends) {
      keyed(strip, ranking[end].map((digest, i) => ({ digest, i })), ({ digest }) => digest, () => {
        const image = createThumb();
        return { element: make("li", {}, image), update: ({ digest, i }) =>
          setAttributes(image, { src: control.pictureURL(digest), alt: `${t(ENDS[end])} ${i + 1}` }) };
      });
    }
  };
  return { element, update };
}

function createVotes(control) {
  const list = make("ul", { class: "pcpo-votes" });
  const element = createPart(t("Last votes"), [list]);
  const create = () => {
    const images = [createThumb(), createThumb()];
    const text = make("span");
    const row = make("li", {}, ...images, text);
    const update = (vote) => {
      ["left", "right"].forEach((side, i) => {
        setAttributes(images[i], { src: control.pictureURL(vote[side]), alt: t(PICTURES[side]) });
        images[i].classList.toggle("pcpo-liked", vote.choice === side);
      });
      setText(text, t(WORDS[vote.choice] ?? vote.choice));
      setAttributes(row, { title: vote.prompt || null });
    };
    return { element: row, update };
  };
  const update = ({ seen }) => {
    element.hidden = !seen.last.length;
    keyed(list, seen.last, ({ id }) => id, create);
  };
  return { element, update };
}

function createThumb() {
  const image = make("img", { draggable: "false", loading: "lazy" });
  image.addEventListener("load", () =>
    image.classList.toggle("pcpo-pixels", image.naturalWidth < 200));
  return image;
}

function createRemove(control) {
  const open = button(t("Delete …"), () => isUsable(open) && confirm.open());
  const confirm = createConfirm(open, () => control.remove());
  let asked = null;
  const update = ({ name, seen, busy }) => {
    if (asked !== name) confirm.close(); // the question was about another
    asked = name;
    setUsable(open, !busy, null);
    confirm.update(t("Delete “{name}” with its {votes} and {pictures}? This cannot be undone. A training that uses it goes on with what it has learnt so far.",
      { name, votes: plural("{count} vote", "{count} votes", seen.votes),
        pictures: plural("{count} picture", "{count} pictures", seen.images) }), !busy);
  };
  return { element: make("div", {}, open, confirm.element), update };
}

/** The stage on which two pictures are compared: over the whole window, with keys of its own. */

import { votesLine, wishOf } from "./ballot.js";
import { button, make, setAttributes, setLine, setText } from "./panel_dom.js";
import { told as translated } from "./words_of_server.js";
import { mark, t } from "./words.js";

const SMALL = 300; // px; smaller pictures are shown with sharp pixels
const SIDES = ["left", "right"];
const OTHERS = [["tie", mark("Equally good"), "↓"], ["neither", mark("Neither is good"), "N"],
  ["skip", mark("Skip"), "↑"], ["undo", mark("Undo"), "Z"]];
const LEFT = mark("There is no pair left. Pairs that a training asks for, and pictures that you add, appear here by themselves.");
const SPOKEN = { left: mark("left picture"), right: mark("right picture"), tie: mark("equally good"),
  neither: mark("neither is good"), skip: mark("skipped"), undo: mark("taken back") };
const DESCRIBED = { left: mark("left picture: {prompt}"), right: mark("right picture: {prompt}") };

/** @param {object} control of taste_control.js. */
export function createStage(control) {
  let shown = null; // id of the pair
  const title = make("h2", { id: "pcpo-ask", tabindex: -1 }, t("Which picture do you like better?"));
  const prompt = make("p", { class: "pcpo-prompt" });
  const source = make("p", { class: "pcpo-soft" });
  const close = button(t("Close"), () => control.leave(), { class: "pcpo-small" });
  const pictures = SIDES.map((side) => createPicture(side, () => wish(side)));
  const pair = make("div", { class: "pcpo-pair" }, ...pictures.map(({ element }) => element));
  const empty = make("p", { class: "pcpo-empty-pair" }, t(LEFT));
  const error = make("p", { class: "pcpo-error", role: "alert" });
  const others = OTHERS.map(([name, text, key]) => {
    const made = button(t(text), (event) => event.detail < 2 && wish(name), { "aria-keyshortcuts": key });
    made.append(" ", make("kbd", {}, key));
    return [name, made];
  });
  const keys = make("span", { class: "pcpo-soft" }, t("Left and right arrow: the picture you like."));
  const count = make("p");
  const said = make("p", { class: "pcpo-soft" });
  const spoken = make("p", { class: "pcpo-unseen", role: "status" });
  const soon = make("div", { hidden: "" });
  const element = make("dialog", { class: "pcpo pcpo-ballot", "aria-labelledby": title.id },
    make("div", { class: "pcpo-ballot-head" }, make("div", {}, title, prompt, source), close),
    error, pair, empty,
    make("div", { class: "pcpo-actions" }, ...others.map(([, made]) => made), keys),
    make("div", { class: "pcpo-ballot-foot" }, count, said), spoken, soon);

  /** What is not seen yet is not judged. */
  function wish(name) {
    const isSeen = pictures.every(({ isSeen }) => isSeen());
    if (!isSeen && !["skip", "undo"].includes(name)) return;
    setText(spoken, t(SPOKEN[name]));
    control.wish(name);
  }

  /** The stage is modal: while it is open all plain keys are its own, and none are ComfyUI's. */
  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    const name = wishOf(event);
    if (name === null) return;
    event.preventDefault();
    if (!event.repeat) wish(name);
  }
  element.addEventListener("close", () => { // by Escape, too
    globalThis.removeEventListener("keydown", press, true);
    element.remove();
    control.leave();
  });

  function update({ ballot, name }) {
    if (!ballot) {
      shown = null;
      if (element.open) element.close();
      return;
    }
    if (!element.open) {
      document.body.append(element);
      globalThis.addEventListener("keydown", press, true); // wherever the focus is
      element.showModal();
      title.focus();
    }
    const { told, busy } = ballot;
    setAttributes(element, { "aria-busy": busy ? "true" : null });
    setLine(error, ballot.error
      && t("{error} The last choice may not be kept.", { error: ballot.error }));
    if (!told) return;
    pair.hidden = !told.pair;
    empty.hidden = Boolean(told.pair);
    setLine(prompt, told.pair && (told.pair.prompt || ""));
    setLine(source, told.pair && control.sourceLine(told.pair.source));
    SIDES.forEach((side, i) => pictures[i].update(told.pair
      && { url: control.pictureURL(told.pair[side]), prompt: told.pair.prompt }));
    setText(count, `${name}: ${votesLine(told)}`);
    setText(said, told.knows.map(translated).join("; "));
    if (told.pair?.id === shown) return;
    shown = told.pair?.id ?? null;
    soon.replaceChildren(...told.soon.map((digest) => // they are read ahead
      make("img", { src: control.pictureURL(digest), alt: "" })));
  }
  return { element, update };
}

/** A picture to press. */
function createPicture(side, choose) {
  const image = make("img", { draggable: "false" });
  const lost = make("span", { hidden: "" }, t("This picture is gone; skip the pair."));
  const element = button("", (event) => event.detail < 2 && choose(), // not a double click's second
    { class: "pcpo-choice", "aria-keyshortcuts": side === "left" ? "ArrowLeft" : "ArrowRight" });
  element.append(image, lost);
  const settle = (isThere) => {
    lost.hidden = isThere;
    element.classList.toggle("pcpo-pixels", isThere && image.naturalWidth < SMALL);
  };
  image.addEventListener("load", () => settle(true));
  image.addEventListener("error", () => settle(false));
  const update = (picture) => {
    if (!picture) return;
    setAttributes(image, { src: picture.url,
      alt: t(picture.prompt ? DESCRIBED[side] : SPOKEN[side], { prompt: picture.prompt }) });
  };
  return { element, update, isSeen: () => image.complete && image.naturalWidth > 0 };
}

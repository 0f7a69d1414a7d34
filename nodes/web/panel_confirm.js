/** Buttons that cannot be used now, and the question before what cannot be undone. */

import { button, make, setAttributes, setText } from "./panel_dom.js";
import { t } from "./words.js";

export const isUsable = (made) => made.getAttribute("aria-disabled") !== "true";

/** Not `disabled`: a button that is under the keyboard's focus keeps it. */
export function setUsable(made, usable, why) {
  setAttributes(made, { "aria-disabled": usable ? null : "true", title: usable ? null : why });
}

let asked = 0; // for ids

/**
 * Asks in place whether to delete.
 *
 * @param {HTMLElement} opener gets the focus back.
 * @param {() => void} remove
 */
export function createConfirm(opener, remove) {
  const question = make("p", { id: `pcpo-question-${asked++}` });
  const yes = button(t("Delete"), () => {
    leave();
    remove();
  }, { class: "pcpo-danger" });
  const no = button(t("Keep"), () => leave());
  const element = make("div", { class: "pcpo-confirm", role: "alertdialog", hidden: "",
    "aria-labelledby": question.id }, question, no, " ", yes);
  const close = () => (element.hidden = true);
  const leave = () => {
    close();
    opener.focus();
  };
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    leave();
  });
  const open = () => {
    element.hidden = false;
    no.focus();
  };
  const update = (text, possible) => {
    setText(question, text);
    if (possible) return;
    if (element.contains(document.activeElement)) leave();
    else close();
  };
  return { element, open, close, update };
}

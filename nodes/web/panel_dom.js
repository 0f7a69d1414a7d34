/** Elements that are made once and patched; data becomes text nodes, never markup. */

/** An element with attributes and children; strings become text. A null attribute is left out. */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  setAttributes(made, attributes);
  made.append(...children);
  return made;
}

/** A button that does not submit anything. */
export function button(text, onClick, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", onClick);
  return made;
}

/** Change what differs; null takes an attribute away. */
export function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
  }
}

/** Change the text where it differs, so that a selection in it survives. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Text that is hidden where there is none. */
export function setLine(element, text) {
  setText(element, text ?? "");
  element.hidden = !text;
}

/** A part that can be folded; it stays as the user left it. */
export function createPart(title, body, isOpen = true) {
  const summary = make("summary", {}, make("h3", {}, title));
  return make("details", { class: "pcpo-part", open: isOpen ? "" : null }, summary, ...body);
}

const updates = new WeakMap();

/**
 * Make the children of an element match a list. A child whose key stays is patched where it is, so
 * that focus and scroll survive.
 *
 * @param {HTMLElement} parent all of whose children are made here.
 * @param {Array} items
 * @param {(item: any) => string | number} key names an item, once in the list.
 * @param {(item: any) => {element: HTMLElement, update: (item: any) => void}} create
 */
export function keyed(parent, items, key, create) {
  const wanted = new Set(items.map((item) => String(key(item))));
  const old = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) old.set(child.dataset.key, child);
    else child.remove();
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = old.get(name);
    if (!child) {
      const { element, update } = create(item);
      child = element;
      child.dataset.key = name;
      updates.set(child, update);
    }
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    updates.get(child)(item);
  }
}

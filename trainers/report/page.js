// ==== the page ===================================================================================

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function theme() {
  const root = document.documentElement.dataset;
  const set = (name) => {
    root.theme = name;
    $("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
  };
  set(root.theme);
  dark.addEventListener("change", () => set(dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => set(root.theme === "dark" ? "light" : "dark"));
}

theme();
$("title").textContent = document.title;

/**
 * The panel's words in the user's language. The English sentence is the key; words/<language>.json has
 * the others, and what is missing there stays English. No DOM, no imports: the report's page has this
 * file, too, in English.
 */

let language = "en";
let dictionary = new Map();

/**
 * Speak a language from now on.
 *
 * @param {string} name as ComfyUI's setting Comfy.Locale says it.
 * @param {Object<string, string | Object<string, string>>} known translations by English sentences.
 */
export function setWords(name, known) {
  language = name;
  dictionary = new Map(Object.entries(known));
}

/** Whether there are words of the user's language, so that ComfyUI has its names of nodes too. */
export const isTranslated = () => dictionary.size > 0;

/** Marks a sentence that `t` looks up later, when the language is known. */
export const mark = (english) => english;

/** A sentence in the user's language; {name} stands for a value. */
export const t = (english, values = {}) => filled(dictionary.get(english) || english, values);

/** A sentence about a number of things, which is its {count}. */
export function plural(one, many, count, values = {}) {
  const forms = dictionary.get(many) ?? { one, other: many };
  const form = forms[new Intl.PluralRules(language).select(count)] || forms.other;
  return filled(form, { count: numeral(count), ...values });
}

const filled = (text, values) => text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);

/** The language with the reader's region, for dates and numbers. */
const region = () => globalThis.navigator?.languages?.find((name) =>
  name === language || name.startsWith(`${language}-`)) ?? language;

const formats = new Map();

/** A number, with no mark between thousands. */
export function numeral(value, options = {}) {
  const name = JSON.stringify([region(), options]);
  if (!formats.has(name)) {
    formats.set(name, new Intl.NumberFormat(region(), { useGrouping: false, ...options }));
  }
  return formats.get(name).format(value);
}

/** A number of seconds, minutes, hours or days. */
export const span = (value, unit) => numeral(value, { style: "unit", unit, unitDisplay: "short" });

/** A date and a time. */
export const dated = (date) =>
  date.toLocaleString(region(), { dateStyle: "medium", timeStyle: "short" });

/** Voting on pairs of pictures, for the panel in ComfyUI and the page of `pcpo taste ask`. No DOM. */

import { plural } from "./words.js";

export const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", ArrowUp: "skip",
  n: "neither", z: "undo" };

/** What a key asks for: a choice, or "undo"; null where it is none of ours. */
export function wishOf({ key, ctrlKey, metaKey, altKey }) {
  if (ctrlKey || metaKey || altKey) return null;
  return KEYS[key.length === 1 ? key.toLowerCase() : key] ?? null;
}

/** How many votes there are, and how many pairs to vote on. */
export const votesLine = ({ votes, waiting }) => [plural("{count} vote", "{count} votes", votes),
  plural("{count} pair waiting", "{count} pairs waiting", waiting)].join(", ");

/**
 * The pair that is shown, and what is asked of the server: one thing at a time.
 *
 * @param {(action: string, body: object) => Promise<object>} ask answers with the state to show.
 * @param {(now: {told: object | null, error: string, busy: boolean}) => void} draw called with each
 *   change.
 */
export function createBallot(ask, draw) {
  const window = globalThis.crypto?.randomUUID?.() ?? String(Math.random()); // tells pages apart
  let now = { told: null, error: "", busy: false };
  const set = (change) => draw(now = { ...now, ...change });

  /** An error stays until something works. */
  async function act(action, more = {}) {
    if (now.busy) return;
    set({ busy: true });
    try {
      set({ told: await ask(action, { window, ...more }), error: "", busy: false });
    } catch (error) {
      set({ error: error.message || String(error), busy: false });
    }
  }
  return {
    next: () => act("next"),
    /** @param {string} wish a choice, or "undo". */
    wish(wish) {
      const pair = now.told?.pair;
      if (wish === "undo") return act("undo");
      return pair ? act("vote", { pair: pair.id, choice: wish }) : undefined;
    },
  };
}

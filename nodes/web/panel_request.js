/** Asks the server, and waits no longer than it must. */

import { failure } from "./panel_state.js";
import { t } from "./words.js";

const PATIENCE = 30_000; // ms for an answer
export const silent = () => t("ComfyUI does not answer; this is its last report.");

/** The options of a request that changes something. */
export const posted = (body = {}) => ({ method: "POST", body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" } });

/**
 * A function that gives the object that is answered; or an error of one sentence, with the status
 * where there is one.
 *
 * @param {(route: string, options?: object) => Promise<Response>} fetchApi
 */
export const createRequest = (fetchApi) => async (route, options) => {
  const limit = new AbortController();
  const timer = setTimeout(() => limit.abort(), PATIENCE);
  let answer;
  let body;
  try {
    answer = await fetchApi(route, { ...options, signal: limit.signal });
    body = await answer.json().catch((error) => {
      if (error instanceof SyntaxError) return null;
      throw error;
    });
  } catch {
    throw new Error(silent());
  } finally {
    clearTimeout(timer);
  }
  if (answer.ok && body !== null) return body;
  const { status } = answer;
  throw Object.assign(new Error(failure(status, body)), { status });
};

/** A task that is never under way twice for a key; a call meanwhile makes it run once more. */
export function single(task) {
  const running = new Map();
  const repeat = async (key, mine) => {
    try {
      do {
        mine.again = false;
        await task(key);
      } while (mine.again);
    } finally {
      running.delete(key);
    }
  };
  return function run(key) {
    const mine = running.get(key) ?? {};
    mine.again = true;
    if (!running.has(key)) {
      running.set(key, mine);
      mine.done = repeat(key, mine);
    }
    return mine.done;
  };
}

/** Between the server and the view: asks, listens, keeps the state. What it needs is given. */

import * as states from "./panel_state.js";

const DETAIL_GAP = 1000; // ms between two readings of the open job, at least
const DRAW_GAP = 100;
const OPEN = "pcpo.open"; // in the session's storage: a page reload opens the same job again

const ASKED = {
  pause: "It pauses when this iteration is finished.",
  continue: "It goes on.",
  stop: "It stops as soon as it can, and nothing is lost.",
  sample: "It samples after this iteration.",
  resume: "It goes on from the last checkpoint.",
  delete: "The job was deleted.",
};

/**
 * @param {object} host
 * @param {(route: string, options?: object) => Promise<Response>} host.fetchApi
 * @param {(route: string) => string} host.apiURL
 * @param {(choice: string) => void} host.addLoader puts "Load Job LoRA" into the graph, with its
 *   choice of a job; or throws.
 * @param {(text: string) => Promise<void>} host.copy
 * @param {() => void} host.browseTemplates
 * @param {() => boolean} host.isShown whether the panel can be seen; else nothing is drawn or read.
 * @param {Storage} host.storage
 * @param {(state: states.State) => void} draw called with the state, at most ten times a second.
 */
export function createControl(host, draw) {
  let state = { ...states.initial(), open: host.storage.getItem(OPEN) };
  const redraw = states.paced(() => host.isShown() && draw(state), DRAW_GAP);

  function set(next) {
    state = next;
    if (state.open) host.storage.setItem(OPEN, state.open);
    else host.storage.removeItem(OPEN);
    redraw();
  }

  async function request(route, options) {
    let answer;
    try {
      answer = await host.fetchApi(route, options);
    } catch {
      throw new Error("ComfyUI does not answer; this is the last that it said.");
    }
    const body = await answer.json().catch(() => null);
    if (!answer.ok || body === null) throw new Error(states.failure(answer.status, body));
    return body;
  }

  const read = single(async () => {
    const count = messages;
    try {
      const { jobs } = await request("/pcpo/jobs");
      if (count === messages) set(states.withJobs(state, jobs)); // else a message was newer
    } catch (error) {
      set({ ...state, loadError: error.message });
    }
  });

  const readDetail = single(async () => {
    if (!state.open) return;
    try {
      set(states.withDetail(state, await request(`/pcpo/jobs/${state.open}`)));
    } catch (error) {
      set({ ...state, loadError: error.message });
    }
  });
  const follow = states.paced(readDetail, DETAIL_GAP);

  let messages = 0;
  const control = {
    /** Read everything anew. */
    async refresh() {
      await read();
      if (state.open && !state.loadError) await readDetail();
    },
    /** A message of the server: all summaries. */
    receive(jobs) {
      messages += 1;
      set(states.withJobs(state, jobs));
      if (host.isShown() && states.isStale(state)) follow();
    },
    /** The connection is gone; ComfyUI's page tries by itself to get it back. */
    disconnected() {
      set({ ...state, loadError: "ComfyUI does not answer; this is the last that it said." });
    },
    open(id) {
      set(states.opened(state, id));
      readDetail();
    },
    close: () => set(states.closed(state)),
    /** Ask something of a job: an action of the routes. */
    async ask(id, action) {
      set(states.asking(state, id, action));
      const options = { method: "POST", body: "{}",
        headers: { "Content-Type": "application/json" } };
      try {
        const { job } = await request(`/pcpo/jobs/${id}/${action}`, options);
        if (action === "delete") set(states.without(state, id));
        else if (job) set(states.withSummary(state, job));
        set({ ...state, note: ASKED[action] });
        if (states.isStale(state)) follow();
      } catch (error) {
        set({ ...state, actionError: error.message });
      }
      set(states.answered(state, id, action));
    },
    addLoader: (job) => local(() => host.addLoader(states.jobChoice(job, state.jobs ?? [])),
      "Load Job LoRA is in the graph."),
    copy: (text) => local(() => host.copy(text), "The path is copied."),
    browseTemplates: () => local(host.browseTemplates, ""),
    sampleURL: (id, iteration, index) =>
      host.apiURL(`/pcpo/jobs/${id}/samples/${iteration}/${index}`),
  };

  /** Do something on this page; whether it worked. */
  async function local(task, note) {
    try {
      await task();
      set({ ...state, actionError: "", note });
      return true;
    } catch (error) {
      set({ ...state, actionError: error.message, note: "" });
      return false;
    }
  }
  return control;
}

/** A task that is never under way twice; a call meanwhile makes it run once more. */
function single(task) {
  let running = null;
  let again = false;
  return function run() {
    if (running) {
      again = true;
      return running;
    }
    running = task().then(() => {
      running = null;
      if (!again) return undefined;
      again = false;
      return run();
    });
    return running;
  };
}

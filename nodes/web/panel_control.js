/** Between the server and the view: asks, listens, keeps the state. What it needs is given. */

import { news } from "./notices.js";
import { createRequest, posted, single, silent } from "./panel_request.js";
import * as states from "./panel_state.js";
import { told } from "./words_of_server.js";
import { mark, t } from "./words.js";

const DETAIL_GAP = 1000; // ms between two readings of the open job, at least
const DRAW_GAP = 100;
const NOTE = 10_000; // ms that a note stays
const OPEN = "pcpo.open"; // in the session's storage: a page reload opens the same job again

const ASKED = {
  pause: mark("The job pauses after this iteration."),
  continue: mark("The job goes on."),
  stop: mark("The job stops after this iteration; nothing is lost."),
  stop_now: mark("The job stops now; resuming repeats the iteration that it breaks off."),
  sample: mark("The job samples after this iteration."),
  resume: mark("The job goes on from its last checkpoint."),
  delete: mark("The job was deleted."),
};

/**
 * @param {object} host
 * @param {(route: string, options?: object) => Promise<Response>} host.fetchApi
 * @param {(route: string) => string} host.imageURL
 * @param {(choice: string) => void} host.addLoader puts "Load Job LoRA" into the graph, with its
 *   choice of a job; or throws.
 * @param {(text: string) => Promise<void>} host.copy
 * @param {() => void} host.browseTemplates
 * @param {() => boolean} host.canAskForNotifications whether the browser has not been asked yet.
 * @param {() => Promise<boolean>} host.askForNotifications
 * @param {() => boolean} host.isShown whether the panel can be seen; else nothing is drawn or read.
 * @param {Storage} host.storage
 * @param {(told: object[], jobs: object[]) => void} host.announce called with what is new of the
 *   jobs, and with the jobs, whenever they are known anew.
 * @param {(state: states.State) => void} draw called with the state, at most ten times a second.
 */
export function createControl(host, draw) {
  let state = { ...states.initial(), open: states.attempt(() => host.storage.getItem(OPEN)) ?? null };
  const redraw = states.paced(() => host.isShown() && states.attempt(() => draw(state)), DRAW_GAP);

  let fading;

  /** Change the state as it is now; never one that was read before waiting for an answer. */
  function set(change) {
    const { jobs: before, note: said } = state;
    state = change(state);
    const { jobs } = state;
    if (state.note !== said) {
      clearTimeout(fading);
      if (state.note) fading = setTimeout(() => set((now) => ({ ...now, note: "" })), NOTE);
      fading?.unref?.(); // outside a browser nothing waits for it
    }
    if (jobs !== before) states.attempt(() => host.announce(news(before, jobs), jobs));
    states.attempt(() => (state.open ? host.storage.setItem(OPEN, state.open)
      : host.storage.removeItem(OPEN)));
    redraw();
  }

  const request = createRequest(host.fetchApi);
  const read = single(async () => {
    try {
      const { jobs, at } = await request("/pcpo/jobs");
      set((now) => states.withJobs(now, jobs, at));
      followOpen();
    } catch ({ message }) {
      set((now) => ({ ...now, loadError: message }));
    }
  });
  const follow = states.paced(read, DETAIL_GAP);

  const readDetail = single(async (id) => {
    try {
      const detail = await request(`/pcpo/jobs/${id}`);
      set((now) => states.withDetail(now, detail));
    } catch ({ message, status }) {
      if (state.open !== id) return;
      if (status === 404) await read(); // which closes it where it is gone
      else set((now) => ({ ...now, loadError: message }));
    }
  });
  const readOpen = async () => state.open && readDetail(state.open);
  const followDetail = states.paced(readOpen, DETAIL_GAP);
  const followOpen = () => host.isShown() && states.isStale(state) && followDetail();

  const control = {
    /** Read everything anew. */
    async refresh() {
      redraw();
      await read();
      if (!state.loadError) await readOpen();
    },
    /** Read the list where nothing is known, so that what comes next is told as news. */
    know: () => (state.jobs === null ? read() : undefined),
    /** A message of the server: all summaries; null where it tells only that some changed. */
    receive({ jobs, at }) {
      if (jobs) {
        set((now) => states.withJobs(now, jobs, at));
        followOpen();
      } else if (host.isShown()) follow();
    },
    /** The connection is gone; ComfyUI's page tries by itself to get it back. */
    disconnected: () => set((now) => ({ ...now, loadError: silent() })),
    reconnected() {
      set(states.reconnected);
      return control.refresh();
    },
    open(id) {
      set((now) => states.opened(now, id));
      readOpen();
    },
    close: () => set(states.closed),
    /** Ask something of a job: an action of the routes. One thing at a time is asked of a job. */
    async ask(id, action) {
      if (state.pending.some((name) => name.startsWith(`${id} `))) return;
      set((now) => states.asking(now, id, action));
      try {
        const { job, at } = await request(`/pcpo/jobs/${id}/${action}`, posted());
        const isDeleted = action === "delete";
        const isOpen = state.open === id;
        set((now) => (isDeleted ? states.without(now, id, at) : states.withSummary(now, job, at)));
        if (isOpen || isDeleted) set((now) => ({ ...now, note: t(ASKED[action]) }));
        followOpen();
      } catch ({ message }) {
        set((now) => ({ ...now, actionError: told(message) }));
        read(); // it may have happened all the same
      } finally {
        set((now) => states.answered(now, id, action));
      }
    },
    addLoader: (job) => local(() => host.addLoader(states.jobChoice(job, state.jobs ?? [])),
      t("Load Job LoRA was added to the graph.")),
    copy: (text, note = t("The path was copied.")) => local(() => host.copy(text), note),
    browseTemplates: () => local(host.browseTemplates, ""),
    canAskForNotifications: () => host.canAskForNotifications(),
    askForNotifications: () => local(host.askForNotifications, ""),
    /** What a job is called; undefined where it is not known. */
    nameOf: (id) => state.jobs?.find((job) => job.id === id)?.name,
    sampleURL: (id, iteration, index) =>
      host.imageURL(`/pcpo/jobs/${id}/samples/${iteration}/${index}`),
  };

  /** Do something on this page; whether it worked. */
  async function local(task, note) {
    try {
      await task();
      set((now) => ({ ...now, actionError: "", note }));
      return true;
    } catch ({ message }) {
      set((now) => ({ ...now, actionError: message, note: "" }));
      return false;
    }
  }
  return control;
}

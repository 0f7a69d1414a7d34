/** The weights of rewards between the server and the view: asks, keeps the state, follows downloads. */

import { createRequest, posted, single } from "./panel_request.js";
import { attempt } from "./panel_state.js";
import { told } from "./words_of_server.js";
import { mark, t } from "./words.js";

const LOOK_GAP = 1000; // ms between two looks at a download
const OPEN = "pcpo.weights.open"; // in the session's storage: the page is open
const ASKED = { download: "", cancel: mark("The download was cancelled; what has arrived is kept.") };

/**
 * @typedef {object} WeightsState
 * @property {boolean} isOpen whether the page is shown in place of the jobs.
 * @property {object[] | null} files each with its key, name, state and what it is for.
 * @property {string} off why nothing may be downloaded; "" where it may.
 */

/** Whether a file is on its way. */
export const isLoading = ({ state }) => ["waiting", "loading", "checking"].includes(state);

/** The files that a job's rewards need and that are not there. */
export function lackOf(job, files) {
  const names = Object.entries(job.config?.rewards ?? {}).map(([label, given]) => given?.name ?? label);
  return (files ?? []).filter(({ state, rewards }) =>
    state !== "there" && rewards.some((name) => names.includes(name)));
}

/** What is new of the files, to be told wherever the user looks. */
export function newsOf(before, after) {
  const loading = new Set((before ?? []).filter(isLoading).map(({ key }) => key));
  return after.filter((file) => loading.has(file.key) && !isLoading(file)).flatMap((file) => {
    const { name, folder, state, message } = file;
    if (state === "there") return [{ id: "weights", kind: "finished", title: t("{file} is there", { file: name }),
      text: t("It is in models/{folder}. Queue the workflow again, or resume the job.", { folder }) }];
    return state === "failed" && message ? [{ id: "weights", kind: "failed",
      title: t("{file} was not downloaded", { file: name }), text: told(message) }] : [];
  });
}

/**
 * @param {object} host see createControl of panel_control.js.
 * @param {(state: WeightsState) => void} draw called with each change.
 */
export function createWeightsControl(host, draw) {
  let state = { isOpen: attempt(() => host.storage.getItem(OPEN)) != null, files: null, off: "",
    busy: [], loadError: "", actionError: "", note: "" };
  const request = createRequest(host.fetchApi);
  let timer = null;

  function set(change) {
    const { files: before } = state;
    state = { ...state, ...change };
    attempt(() => (state.isOpen ? host.storage.setItem(OPEN, "yes") : host.storage.removeItem(OPEN)));
    if (change.files) attempt(() => newsOf(before, state.files).forEach(host.tell));
    attempt(() => draw(state));
  }

  /** Read all; again for as long as something is on its way. */
  const read = single(async () => {
    clearTimeout(timer);
    try {
      const { files, off } = await request("/pcpo/weights");
      set({ files, off: off ?? "", loadError: "" });
    } catch ({ message }) {
      set({ loadError: message });
    }
    if (state.files?.some(isLoading)) timer = setTimeout(read, LOOK_GAP);
    timer?.unref?.(); // outside a browser nothing waits for it
  });

  /** Ask something of a file: "download" or "cancel". */
  async function ask(key, action) {
    if (state.busy.includes(key)) return;
    set({ busy: [...state.busy, key], actionError: "", note: "" });
    try {
      await request(`/pcpo/weights/${encodeURIComponent(key)}/${action}`, posted());
      set({ note: t(ASKED[action]) });
    } catch ({ message }) {
      set({ actionError: told(message) });
    } finally {
      set({ busy: state.busy.filter((each) => each !== key) });
    }
    await read();
  }

  return {
    open() {
      set({ isOpen: true, actionError: "", note: "" });
      return read();
    },
    close: () => set({ isOpen: false, actionError: "", note: "" }),
    /** Draw, and look anew where it is shown. */
    refresh() {
      set({});
      return state.isOpen ? read() : undefined;
    },
    /** Read what is there once, for the page of a job that failed. */
    know: () => (state.files === null && !state.loadError ? read() : undefined),
    download: (key) => ask(key, "download"),
    cancel: (key) => ask(key, "cancel"),
  };
}

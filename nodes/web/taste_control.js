/** The page Taste between the server and its view: asks, keeps the state, looks again while shown. */

import { createBallot } from "./ballot.js";
import { createRequest, posted, single } from "./panel_request.js";
import { attempt, paced } from "./panel_state.js";
import { t } from "./words.js";

const LOOK_GAP = 2500; // ms between two looks at what others add
const NAME = "pcpo.taste"; // in the session's storage: the chosen taste
const OPEN = "pcpo.taste.open"; // likewise: the page is open
const FIRST = "my-taste"; // the name of a taste that is made by the way

/**
 * @typedef {object} TasteState
 * @property {boolean} isOpen whether the page is shown in place of the jobs.
 * @property {object[] | null} tastes name, votes, waiting and folder of each.
 * @property {string | null} name the chosen one.
 * @property {object | null} seen what is known of it.
 * @property {object | null} ranking its first and last pictures.
 * @property {object | null} ballot the pair that is voted on; null where the stage is closed.
 * @property {string} busy what is under way.
 */

/** The folders that a job's rewards name; those of tastes are among them. */
export const foldersOf = (job) => Object.values(job.config?.rewards ?? {})
  .map((given) => given?.options?.folder).filter(Boolean);

/** The taste that a job is trained on, of a list; undefined if none. */
export const tasteOf = (job, tastes) =>
  (tastes ?? []).find(({ folder }) => foldersOf(job).includes(folder));

/**
 * @param {object} host see createControl of panel_control.js.
 * @param {(state: TasteState) => void} draw called with each change.
 */
export function createTasteControl(host, draw) {
  const kept = (key) => attempt(() => host.storage.getItem(key)) ?? null;
  let state = { isOpen: kept(OPEN) !== null, tastes: null, name: kept(NAME), seen: null,
    ranking: null, ballot: null, busy: "", loadError: "", actionError: "", note: "" };
  let voting = null;
  const request = createRequest(host.fetchApi);
  const route = (name, rest = "") => `/pcpo/tastes/${encodeURIComponent(name)}${rest}`;
  const keep = (key, value) => attempt(() => (value ? host.storage.setItem(key, value)
    : host.storage.removeItem(key)));

  function set(change) {
    state = { ...state, ...change };
    keep(NAME, state.name);
    keep(OPEN, state.isOpen ? "yes" : null);
    attempt(() => draw(state));
  }

  const readList = single(async () => {
    try {
      const { tastes } = await request("/pcpo/tastes");
      const names = tastes.map(({ name }) => name);
      if (names.includes(state.name)) set({ tastes, loadError: "" });
      else set({ tastes, loadError: "", name: names[0] ?? null, seen: null, ranking: null });
    } catch ({ message }) {
      set({ loadError: message });
    }
  });

  const readSeen = single(async (name) => {
    try {
      const seen = await request(route(name));
      if (state.name === name) set({ seen, loadError: "" });
      const { head, offers } = seen;
      if (state.ranking?.head === head && state.ranking.offers === offers) return;
      const ranking = { ...await request(route(name, "/ranking")), head, offers };
      if (state.name === name) set({ ranking });
    } catch ({ message, status }) {
      if (state.name !== name) return;
      if (status === 404) await lose(message);
      else set({ loadError: message });
    }
  });

  /** The chosen taste is there no more. */
  async function lose(why) {
    voting = null;
    set({ name: null, seen: null, ranking: null, ballot: null, note: "", actionError: why });
    await look();
  }

  const look = async () => {
    await readList();
    if (state.name) await readSeen(state.name);
    const isOut = voting && state.ballot && !state.ballot.busy && !state.ballot.told?.pair;
    if (isOut && state.seen?.waiting && !state.ballot.error) await voting.next();
  };
  let timer = null;
  const isLooked = () => state.ballot || (state.isOpen && host.isShown());
  /** Look, and look again for as long as the page is there. */
  async function follow() {
    clearTimeout(timer);
    if (isLooked() && !globalThis.document?.hidden) await look();
    clearTimeout(timer);
    if (state.isOpen || state.ballot) timer = setTimeout(follow, LOOK_GAP);
  }

  /** Do something that the user asked for; what it gives, or undefined where it failed. */
  async function ask(what, task) {
    if (state.busy) return undefined;
    set({ busy: what, actionError: "", note: "" });
    try {
      return await task();
    } catch ({ message, status }) {
      if (status === 404 && what !== "new") await lose(message);
      else set({ actionError: message });
      return undefined;
    } finally {
      set({ busy: "" });
    }
  }

  const make = async (name) => {
    const made = await request("/pcpo/tastes", posted({ name }));
    set({ name: made.name, seen: null, ranking: null });
    return made;
  };

  /** A ballot's request; what it tells is news of the taste, too. */
  const cast = async (name, action, body) => {
    try {
      const told = await request(route(name, `/${action}`), posted(body));
      if (state.name === name) state = { ...state, seen: { ...state.seen, ...told } };
      return told;
    } catch (error) {
      if (error.status === 404) await lose(error.message);
      throw error;
    }
  };

  const control = {
    open() {
      set({ isOpen: true, actionError: "", note: "" });
      return follow();
    },
    close: () => set({ isOpen: false, actionError: "", note: "" }),
    /** Draw, and look anew where the page is shown. */
    refresh() {
      set({});
      return state.isOpen ? follow() : undefined;
    },
    choose(name) {
      set({ name, seen: null, ranking: null, actionError: "", note: "" });
      return follow();
    },
    async create(name) {
      const made = await ask("new", () => make(name));
      if (made) await follow();
      return Boolean(made);
    },
    async remove() {
      const { name } = state;
      const gone = await ask("delete", () => request(route(name, "/delete"), posted()));
      if (!gone) return;
      set({ name: null, seen: null, ranking: null, note: t("The taste “{name}” was deleted.", { name }) });
      await follow();
    },
    /** Open the stage on which pairs are voted on. */
    vote() {
      const { name } = state;
      const shown = createBallot((action, body) => cast(name, action, body),
        (ballot) => voting === shown && set({ ballot }));
      voting = shown;
      set({ ballot: { told: null, error: "", busy: true }, note: "", actionError: "" });
      follow();
      return voting.next();
    },
    wish: (wish) => voting?.wish(wish),
    /** Close the stage. */
    leave() {
      voting = null;
      set({ ballot: null });
      return follow();
    },
    /** Put pairs of a job's samples into the queue of its taste or the chosen one, and vote. */
    async rate(job) {
      const told = await ask(`rate ${job.id}`, async () => {
        if (state.tastes === null) await readList();
        const name = tasteOf(job, state.tastes)?.name ?? state.name ?? (await make(FIRST)).name;
        return request(route(name, "/ask"), posted({ job: job.id }));
      });
      if (told) await control.voteOn(told.name);
    },
    /** Open the stage of a taste. */
    async voteOn(name) {
      set({ name, ...(name === state.name ? {} : { seen: null, ranking: null }) });
      await control.vote();
    },
    /** Read the list now and then, for the page of a job. */
    listen: paced(readList, LOOK_GAP),
    /** Where a pair is from; a job by its name. */
    sourceLine: (source) => source.replace(/^[0-9a-f]{16}\b/, (id) => host.jobName(id) ?? id),
    pictureURL: (digest) => host.imageURL(route(state.name, `/images/${digest}`)),
  };
  return control;
}

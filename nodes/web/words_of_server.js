/**
 * The sentences that the server writes for the panel, in the user's language. Those of errors, which
 * are without number, stay English. Pure: no DOM.
 */

import { mark, t } from "./words.js";

const SAID = [
  // how a run ended
  mark("held-out reward {before} -> {after}"),
  mark("no held-out prompts, so no reward to compare by"),
  mark("nothing could be learnt in {count} of {all} iterations, whose rewards were equal: take another reward, other prompts or more images of each"),
  mark("{file} is not of this run and was left as it is"),
  mark("{file} could not be written ({why})"),
  mark("the LoRA is in {folder}"),
  mark("stopped as asked"),
  mark("stopped by a signal"),
  mark("stopped, because the command that started the processes has ended"),
  mark("saved and stopped, as set, because ComfyUI ended"),
  mark("taken out of the queue"),
  mark("waiting for ComfyUI's queue"),
  mark("the worker was killed"),
  mark("resume to go on from its last checkpoint"),
  mark("the worker ended with an error: {why}"),
  mark("no worker process could be started: {why}"),
  // the guard: its rule, and what its last look said
  mark("The guard looks every iteration at {prompts} held-out prompts, {images} images each"),
  mark("The guard looks every {count} iterations at {prompts} held-out prompts, {images} images each"),
  mark("It has no bounds"),
  mark("Out of bounds is where {what}"),
  mark("{name} is below {share} of the base's"),
  mark("{name} is more than {fall} below the base's"),
  mark("Training ends after one look out of bounds"),
  mark("Training ends after {count} looks in a row out of bounds"),
  mark("the best iteration is the one of highest reward within the bounds"),
  mark("the best iteration is the one of highest reward"),
  mark("iteration {number} is within the guard's bounds"),
  mark("iteration {number} is out of the guard's bounds: {what}"),
  mark("ended by the guard at iteration {number}: {what}"),
  mark("no iteration was within the bounds"),
  mark("the best within the bounds is iteration {number}, with a reward of {reward} (the base has {base})"),
  mark("{name} is {value}, below {bound} (the base has {base})"),
  mark("{name} is {value}, above {bound}"),
  mark("{name} is above {bound}"),
  mark("pixel diversity"),
  mark("ssim diversity"),
  mark("lpips diversity"),
  mark("drift in pixels"),
  // what a taste knows
  mark("it was not fitted yet"),
  mark("fitted to {votes} votes, {random} of them on random pairs"),
  mark("agrees with you on {share} of {count} random pairs ({low} to {high})"),
  mark("{share} after {votes} votes"),
  mark("the last votes changed little: more of the same kind would bring little"),
  mark("twice the votes would bring at most about {share} more"),
  mark("all {count} choices fell on the left picture"),
  mark("all {count} choices fell on the right picture"),
  mark("{count} pairs were decided both ways at different times"),
  mark("both ways count"),
  mark("it has {votes} votes"),
  mark("give it {count} or more"),
  mark("it was never tested on random pairs"),
  mark("it agrees with you on {share} of random pairs, and half is chance"),
  mark("vote on more pairs"),
  mark("the taste does not know you yet: {why}"),
  // what cannot be done with a job
  mark("{job} is about to start; ask again in a moment"),
  mark("{job} is about to end; delete it in a moment"),
  mark("{job} is stopping; wait until it has, then resume it"),
  mark("there is no job {id}; it may have been deleted"),
  // weights of rewards
  mark("Downloads are off, because others than its owner may reach this ComfyUI. The owner can allow them: start it with PCPO_DOWNLOADS=on."),
  mark("Downloads are off, as the environment variable PCPO_DOWNLOADS says."),
  mark("This pack knows no checksum of the file, so it is not downloaded from here; get it by hand"),
  mark("This file is there, but it is another than the one published: its sha256 is {sum}. Move it away, then download."),
  mark("What arrived is another file than the one published: its sha256 is {sum}. Nothing was kept."),
  mark("The source does not answer ({why}); what has arrived is kept."),
  mark("The connection broke ({why}); what has arrived is kept."),
  mark("The disk is full: {need} are needed, {free} are free. What has arrived is kept."),
  mark("The file cannot be written ({why})."),
  mark("The download was cancelled; what has arrived is kept."),
  mark("It is being downloaded already."),
  mark("It is there already."),
  mark("It is not being downloaded."),
];

const PATTERNS = SAID.map((english) => [english, new RegExp(`^${english
  .replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace(/\{(\w+)\}/g, "(?<$1>.+?)")}(?<stop>\\.?)$`, "s")]);
const WHOLE = [" and ", " or "]; // translated only where both sides are known
const JOINED = { // what is between the sentences and clauses of a text
  ". ": mark("{one}. {two}"), "; ": mark("{one}; {two}"), " and ": mark("{one} and {two}"),
  " or ": mark("{one} or {two}"), ", ": mark("{one}, {two}"),
};
const ENDED = mark("{sentence}.");

/** A text of the server in the user's language, as far as it is one of those above. */
export const told = (text) => translated(text ?? "") ?? text ?? "";

function translated(text) {
  for (const [english, pattern] of PATTERNS) {
    const { stop, ...values } = pattern.exec(text)?.groups ?? { stop: null };
    if (stop === null) continue;
    const known = Object.entries(values).map(([name, value]) => [name, told(value)]);
    const sentence = t(english, Object.fromEntries(known));
    return stop ? t(ENDED, { sentence }) : sentence;
  }
  const mid = Object.keys(JOINED).find((each) => text.includes(each));
  if (!mid) return null;
  const parts = text.split(mid);
  const found = parts.map(translated);
  if (found.every((part) => part === null) || (WHOLE.includes(mid) && found.includes(null))) return null;
  return found.map((part, i) => part ?? parts[i]).reduce((one, two) => t(JOINED[mid], { one, two }));
}

// Looks at the service every two seconds, seldom while nobody sees the page or nothing answers, and shows what it says.

import { Problem, get, now, useKey } from "/page/api.js";
import { askKey } from "/page/dialog.js";
import { byId, paint, timeOfDay } from "/page/dom.js";
import { showDead, showQueue, showReplicas, showWeights } from "/page/fleet.js";
import { showHard, showRun, showRuns } from "/page/run.js";

const LOOK_MS = 2000;
const RARELY = 4; // looks between two at what seldom changes
const SELDOM_MS = 30000;
const LETTERS = 20;
const SAMPLES = 60;

let timer = 0;
let looking = false;
let again = false; // somebody wants to look while a look is under way
let looks = 0; // since everything was looked at
let known = []; // runs
let newest; // feedback that was shown
let hint = ""; // what tells that something changed which is seldom looked at
let failures = 0; // in a row, without any answer
let answered = 0; // when there was an answer; unix seconds

// Something was done: look at everything at once.
function lookAnew() {
  looks = 0;
  look();
}

async function look() {
  if (looking) {
    again = true;
    return;
  }
  looking = true;
  clearTimeout(timer);
  try {
    await show();
    failures = 0;
    answered = now();
    connected("live", "live", timeOfDay(answered));
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) useKey(await askKey());
    else failed();
    again ||= problem.status === 401;
  } finally {
    looking = false;
    const wait = again ? 0 : document.hidden ? SELDOM_MS : Math.min(SELDOM_MS, LOOK_MS * 2 ** Math.min(failures, 4));
    again = false;
    timer = setTimeout(look, wait);
  }
}

function failed() {
  failures += 1;
  connected(answered ? `not reachable since ${timeOfDay(answered)}` : "not reachable", "bad");
}

function connected(text, state, clock = "") {
  byId("connection").className = `connection ${state}`;
  paint(byId("state"), text, () => document.createTextNode(text)); // read aloud when it changes, and so without the time
  byId("clock").textContent = clock;
}

// Raises a Problem when there is no answer at all, or a key is wanted; else each part shows its own.
async function show() {
  const all = looks === 0;
  looks = (looks + 1) % RARELY;
  const often = ["/v1/runs", "/v1/queue", "/v1/replicas"].map(part);
  const rarely = all ? [`/v1/dead-letters?limit=${LETTERS}`, "/v1/weights"].map(part) : [];
  const [runs, queue, replicas, dead, weights] = await Promise.all([...often, ...rarely]);
  known = runs.data?.data ?? known;
  const run = known.find((one) => one.run === chosen()) ?? known[0];
  showRuns(known, run?.run);
  showRun(run, runs.problem);
  showQueue(queue.data, queue.problem);
  showReplicas(replicas.data, replicas.problem);
  const told = JSON.stringify([queue.data?.dead, replicas.data?.data.map((replica) => replica.weights)]);
  if (!all && told !== hint) looks = 0;
  hint = told;
  if (all) {
    showDead(dead.data, dead.problem, lookAnew);
    showWeights(weights.data, weights.problem, lookAnew);
  }
  document.title = run ? `${run.run}: ${run.state} · onthefly` : "onthefly";
  if (!run) showHard(undefined, []);
  else if (all || run.newest_feedback !== newest) showHard(run, await samples(run));
  newest = run?.newest_feedback;
}

async function part(path) {
  try {
    return { data: await get(path) };
  } catch (problem) {
    if (!(problem instanceof Problem) || problem.status === 0 || problem.status === 401) throw problem;
    return { problem: problem.message };
  }
}

// Those of the hard sources first, then whatever else is recent.
async function samples(run) {
  const path = `/v1/runs/${encodeURIComponent(run.run)}/samples?limit=${SAMPLES}`;
  const sources = run.hard.map((sample) => `&source=${encodeURIComponent(sample.sample_id)}`).join("");
  const found = await Promise.all([sources ? part(path + sources) : { data: { data: [] } }, part(path)]);
  return [...new Map(found.flatMap((answer) => answer.data?.data ?? []).map((one) => [one.sample.id, one])).values()];
}

function chosen() {
  return new URLSearchParams(location.hash.slice(1)).get("run");
}

addEventListener("hashchange", lookAnew);
document.addEventListener("visibilitychange", () => document.hidden || look());
look();

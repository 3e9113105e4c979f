// What runs share: the queue, dead letters, weights, replicas; and what operators may do with them.

import { now, post, remove, useKey } from "/page/api.js";
import { lineChart, ticks } from "/page/chart.js";
import { ask, askKey, say } from "/page/dialog.js";
import { byId, count, date, duration, h, paint, percent, plural } from "/page/dom.js";
import { note } from "/page/run.js";

const MINUTES = 10; // of the queue's past, kept by this page
const ACTIVATION_S = 60;
const depths = []; // {time, waiting, in_work}

const cells = (...values) => values.map(([name, value, kind]) => h("td", { class: kind, "data-name": name }, value));
const head = (...names) => h("thead", {}, h("tr", {}, names.map(([name, kind]) => h("th", { scope: "col", class: kind }, name))));

// Run an action of the operator; what came of it is said, and the page looks again.
async function act(button, action, look) {
  button.disabled = true;
  try {
    say(await action());
  } catch (problem) {
    say(problem.message, true);
    if (problem.status === 401 || problem.status === 403) useKey(await askKey("This wants another key"));
  }
  button.disabled = false;
  look();
}

// ---------------------------------------------------------------- queue

export function showQueue(queue, problem) {
  if (queue) {
    depths.push({ time: now(), ...queue });
    while (depths[0].time < now() - 60 * MINUTES) depths.shift();
  }
  paint(byId("queue"), queue ? depths : [problem], () => (queue ? queueChart(queue) : note(problem ?? "Nothing is known yet.")));
}

function queueChart(queue) {
  const end = depths.at(-1).time;
  const ago = ({ time }) => (time - end) / 60;
  const highest = Math.max(4, ...depths.map((depth) => Math.max(depth.waiting, depth.in_work)));
  const from = -Math.min(MINUTES, Math.max(1, Math.ceil(-ago(depths[0]))));
  const fact = (name, value, bad) => h("div", {}, h("dt", {}, name), h("dd", { class: bad ? "bad" : null }, count(value)));
  return [
    h("dl", { class: "facts tight" }, fact("waiting", queue.waiting), fact("in work", queue.in_work), fact("dead", queue.dead, queue.dead > 0)),
    lineChart({
      title: `Work units over the last minutes. Now ${queue.waiting} waiting, ${queue.in_work} in work.`,
      x: { label: "minutes ago", from, to: 0, ticks: ticks(from, 0, 5, 1), format: (minutes) => (minutes === 0 ? "now" : String(-minutes)) },
      y: { label: "work units", from: 0, to: highest, ticks: ticks(0, highest, 4, 1), format: count },
      series: [
        { name: "waiting", style: "first", area: true, points: depths.map((depth) => [ago(depth), depth.waiting]) },
        { name: "in work", style: "second", points: depths.map((depth) => [ago(depth), depth.in_work]) },
      ],
    }),
  ];
}

// ---------------------------------------------------------------- dead letters

export function showDead(letters, problem, look) {
  paint(byId("dead"), [letters, problem], () => {
    if (!letters) return note(problem ?? "Nothing is known yet.");
    if (letters.total === 0) return note("None.");
    const columns = head(["unit"], ["run"], ["why"], ["tries", "number"], ["when"], [""]);
    const older = letters.total - letters.data.length;
    return [
      h("table", { class: "stacking" }, columns, h("tbody", {}, letters.data.map((info) => letterRow(info, look)))),
      older > 0 && note(`and ${plural(older, "older one")}: GET /v1/dead-letters?before=${letters.data.at(-1).id}`),
    ];
  });
}

function letterRow(info, look) {
  const { problem, deliveries, time } = info.letter;
  const unit = info.unit_id ?? `entry ${info.id}`;
  const path = `/v1/dead-letters/${info.id}`;
  const retry = (event) => act(event.target, async () => (await post(`${path}/retry`), `${unit} is on the queue again`), look);
  const drop = async (event) => {
    const body = h("p", {}, `Nobody will make the samples of ${unit}.`);
    if (await ask({ title: "Drop this dead letter?", body, confirm: "Drop" })) act(event.target, async () => (await remove(path), `${unit} is dropped`), look);
  };
  const buttons = [
    info.unit_id !== null && h("button", { onclick: retry, "data-key": `retry ${info.id}`, "aria-label": `Retry ${unit}` }, "Retry"),
    h("button", { onclick: drop, "data-key": `drop ${info.id}`, "aria-label": `Drop ${unit}` }, "Drop"),
  ];
  return h(
    "tr",
    {},
    cells(["unit", h("code", {}, unit)], ["run", info.run === null ? "–" : [info.run, h("span", { class: "more" }, `feedback ${info.feedback}`)], "brief"], ["why", problem.detail ?? problem.title ?? "unknown", "long"], ["tries", count(deliveries), "number"], ["when", date(time), "brief"]),
    h("td", { class: "actions" }, buttons.filter(Boolean)),
  );
}

// ---------------------------------------------------------------- weights

export function showWeights(weights, problem, look) {
  paint(byId("weights"), [weights, problem], () => {
    if (!weights) return note(problem ?? "Nothing is known yet.");
    const newest = [...weights.data].sort((a, b) => b.active - a.active || b.created - a.created);
    const columns = head(["set"], ["kind"], ["classes", "number"], ["made"], [""]);
    return h("table", { class: "stacking" }, columns, h("tbody", {}, newest.map((set) => weightsRow(set, look))));
  });
}

function weightsRow(set, look) {
  const ref = `${set.name}@${set.version}`;
  const activate = async (event) => {
    const body = h("p", {}, "Every replica serves it between two batches. Work that waits is still made with the weights it was planned for.");
    if (!(await ask({ title: `Activate ${ref}?`, body, confirm: "Activate" }))) return;
    const order = { version: set.version, timeout_s: ACTIVATION_S };
    say(`${ref}: waiting for all replicas`);
    act(event.target, async () => (await post(`/v1/weights/${encodeURIComponent(set.name)}/activate`, order, 1000 * (ACTIVATION_S + 60)), `${ref} is active on all replicas`), look);
  };
  const button = h("button", { onclick: activate, "data-key": `activate ${ref}`, "aria-label": `Activate ${ref}` }, "Activate");
  return h(
    "tr",
    { class: set.active ? "active" : null },
    cells(["set", [h("b", {}, ref), h("code", { class: "more" }, set.digest.slice(0, 8))], "name"], ["kind", set.base ? `${set.kind.replaceAll("_", " ")} on ${set.base}` : set.kind], ["classes", set.classes.length ? count(set.classes.length) : "text", "number"], ["made", date(set.created), "brief"]),
    h("td", { class: "actions" }, set.active ? h("span", { class: "state live" }, "active") : button),
  );
}

// ---------------------------------------------------------------- replicas

export function showReplicas(replicas, problem) {
  paint(byId("replicas"), [replicas, problem, replicas && Math.round(now() / 2)], () => {
    if (!replicas) return note(problem ?? "Nothing is known yet.");
    const columns = head(["replica"], ["weights"], ["waiting", "number"], ["images", "number"], ["busy", "number"], ["seen"]);
    return h("table", { class: "stacking" }, columns, h("tbody", {}, replicas.data.map(replicaRow)));
  });
}

function replicaRow(replica) {
  const { state, weights, seen, started } = replica;
  const name = [h("b", {}, replica.name), h("span", { class: `state ${state === "ready" ? "live" : ""}` }, state), replica.problem && h("span", { class: "problem" }, replica.problem)];
  return h(
    "tr",
    {},
    cells(["replica", name.filter(Boolean), "name"], ["weights", weights ? `${weights.name}@${weights.version}` : "–"], ["waiting", count(replica.waiting_rows), "number"], ["images", count(replica.images), "number"], ["busy", percent(Math.min(1, replica.busy_s / Math.max(1, seen - started))), "number"], ["seen", `${duration(now() - seen)} ago`]),
  );
}

// One training run: where it is, how good it is, what it finds hard and what was made of that.

import { now, picture } from "/page/api.js";
import { lineChart, ticks } from "/page/chart.js";
import { ask } from "/page/dialog.js";
import { byId, count, date, duration, h, paint, percent, plural } from "/page/dom.js";

const SILENT_S = 20; // without a word, after which a run that should speak is called silent
const STATES = { training: "training", waiting: "waiting for samples", done: "done", stopped: "stopped", failed: "failed" };
const MADE = 4; // samples shown beside a hard one
const CARDS = 8; // of real samples: the hardest, then those asked for earlier

const goesOn = (run) => run.state === "training" || run.state === "waiting";

// ---------------------------------------------------------------- which run

export function showRuns(runs, chosen) {
  const link = (run) =>
    h("a", { href: `#run=${encodeURIComponent(run)}`, "aria-current": run === chosen ? "page" : null, "data-key": `run ${run}` }, run);
  const names = runs.map((run) => run.run);
  paint(byId("runs"), [names, chosen], () => (names.length > 1 ? names.map(link) : []));
}

// ---------------------------------------------------------------- where it is

export function showRun(run, problem) {
  const silent = run && goesOn(run) && now() - run.seen > SILENT_S ? Math.round((now() - run.seen) / 10) * 10 : 0;
  paint(byId("run"), [run && { ...run, seen: 0, curve: run.curve.at(-1) }, silent, problem], () => (run ? headline(run, silent, problem) : empty(problem)));
  const curve = run?.curve ?? [];
  paint(byId("accuracy"), [curve, run?.iterations], () => (curve.length ? accuracy(run) : note("There is a point once the first iteration has ended.")));
}

export const note = (text) => h("p", { class: "note" }, text);

function empty(problem) {
  return [h("h1", {}, problem ? "Runs are not known" : "No run yet"), note(problem ?? "No trainer has reported in the last seven days. `onthefly up --config FILE` starts one.")];
}

function headline(run, silent, problem) {
  const state = silent ? `silent for ${duration(silent)}` : STATES[run.state];
  const bad = silent || run.state === "failed";
  const at = Math.min(run.iteration + 1, run.iterations);
  const done = run.state === "done";
  return [
    h("div", { class: "title" }, h("h1", {}, run.run), h("span", { class: `state ${bad ? "bad" : goesOn(run) ? "live" : ""}` }, state), h("span", { class: "aside" }, `mode ${run.mode}, since ${date(run.started)}`)),
    [run.problem, problem].filter(Boolean).map((text) => h("p", { class: "problem", role: "alert" }, text)),
    h("div", { class: "progress" }, h("progress", { max: run.iterations, value: done ? run.iterations : run.iteration, "aria-labelledby": "iteration" }), h("span", { id: "iteration" }, done ? `all ${plural(run.iterations, "iteration")}` : `iteration ${at} of ${run.iterations}`)),
    facts(run),
  ];
}

function facts(run) {
  const last = run.curve.at(-1);
  const asked = run.newest_feedback;
  const fact = (name, value, more) => h("div", {}, h("dt", {}, name), h("dd", {}, value, more && h("span", { class: "more" }, more)));
  return h(
    "dl",
    { class: "facts" },
    fact(figure(run), last ? percent(last.score, 1) : "–", last && last.score === null ? "nothing held out" : null),
    fact("train top-1", last ? percent(last.train_top1, 1) : "–"),
    fact("updates", count(run.updates)),
    fact("kept", last ? `${count(last.kept)} of ${count(last.candidates)}` : "–", "synthetic, last iteration"),
    fact("staleness K", count(run.max_staleness), asked === null ? "nothing asked yet" : `feedback ${asked}${run.oldest_useful === null ? "" : `, useful from ${run.oldest_useful}`}`),
    fact("unused", count(run.unused), "arrived, not taken yet"),
    fact("stale", count(run.stale), "dropped for coming late"),
    share("trainer idle", run.trainer_idle),
    share("generators idle", run.generator_idle),
  );
}

/** What a run's score is called: each task has a main figure of its own. */
function figure(run) {
  const name = run.curve.at(-1)?.headline ?? "test_top1";
  return { test_top1: "test top-1", verification: "verified pairs" }[name] ?? name;
}

function share(name, part) {
  return h("div", {}, h("dt", {}, name), h("dd", {}, percent(part), h("progress", { class: "share", max: 1, value: part ?? 0, "aria-label": name })));
}

function accuracy(run) {
  const { curve } = run;
  const test = curve.filter((point) => point.score !== null).map((point) => [point.iteration + 1, point.score]);
  const name = figure(run);
  const train = curve.map((point) => [point.iteration + 1, point.train_top1]);
  const lowest = Math.min(...[...test, ...train].map(([, value]) => value));
  const from = Math.min(0.9, Math.floor(10 * lowest) / 10);
  const to = Math.max(2, run.iterations);
  const told = (iteration, value) => `${percent(value, 1)} after iteration ${iteration}`;
  const latest = curve.at(-1);
  return [
    lineChart({
      title: `${name} and train top-1 by iteration. Latest: ${name} ${percent(latest.score, 1)}, train top-1 ${percent(latest.train_top1, 1)}.`,
      x: { label: "iteration", from: 1, to, ticks: ticks(1, to, 8, 1), format: String },
      y: { label: name === "test top-1" ? "top-1" : "score", from, to: 1, ticks: ticks(from, 1, 4), format: (value) => percent(value) },
      series: [
        { name: name === "test top-1" ? "test" : name, style: "first", points: test, dots: told },
        { name: "train", style: "second", points: train, dots: told },
      ],
    }),
    h("details", { "data-key": "accuracy table" }, h("summary", {}, "As a table"), curveTable(curve, name)),
  ];
}

function curveTable(curve, name) {
  const row = (point) => h("tr", {}, [point.iteration + 1, count(point.updates), percent(point.score, 1), percent(point.train_top1, 1), `${point.kept} of ${point.candidates}`].map((cell) => h("td", { class: "number" }, String(cell))));
  const names = ["iteration", "updates", name === "test top-1" ? "test" : name, "train", "kept"];
  return h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col", class: "number" }, name)))), h("tbody", {}, curve.map(row)));
}

// ---------------------------------------------------------------- what is hard, and what was made of it

export function showHard(run, shown) {
  const hard = run?.hard ?? [];
  const cards = hard.map((sample) => [sample, shown.filter((one) => one.sample.source_id === sample.sample_id)]);
  const named = new Set(hard.map((sample) => sample.sample_id));
  for (const one of shown.filter((other) => !named.has(other.sample.source_id))) {
    named.add(one.sample.source_id);
    const known = { sample_id: one.sample.source_id, class_name: one.sample.class_name, score: null };
    cards.push([known, shown.filter((other) => other.sample.source_id === one.sample.source_id)]);
  }
  const ids = cards.map(([sample, made]) => [sample, made.map((one) => one.sample.id)]);
  paint(byId("hard"), ids, () => (cards.length ? h("ul", { class: "cards" }, cards.slice(0, CARDS).map(card)) : note("They appear with the first feedback.")));
}

function card([sample, made]) {
  return h(
    "li",
    { class: "card" },
    h("div", { class: "real" }, real(sample.sample_id, `the real sample, class ${sample.class_name}`), h("div", { class: "caption" }, h("b", {}, sample.class_name ?? "?"), h("span", {}, sample.score === null ? "asked earlier" : `score ${sample.score.toFixed(3)}`))),
    h("div", { class: "made" }, made.length ? made.slice(0, MADE).map((one) => thumbnail(one, sample)) : h("span", { class: "more" }, "none arrived yet")),
  );
}

function thumbnail(one, source) {
  const name = `Synthetic sample of class ${one.sample.class_name}, feedback ${one.sample.feedback}: where it came from`;
  const open = () => ask({ title: "Where this sample came from", body: provenance(one, source), wide: true });
  const image = h("img", { src: inline(one), alt: "", width: 56, height: 56 });
  return h("button", { class: `thumbnail${one.sample.near_copy ? " copy" : ""}`, "aria-label": name, title: `feedback ${one.sample.feedback}`, onclick: open, "data-key": `sample ${one.sample.id}` }, image);
}

// The picture of a synthetic sample, which moves where that is a clip.
const inline = (one) => `data:${one.media_type};base64,${one.thumbnail}`;

// A real sample's picture, once it is there; a service may not have it. `frame`: of a clip; null: its first.
function real(id, alt, frame = null) {
  const image = h("img", { alt, width: 56, height: 56, class: "pending" });
  picture(`/v1/sources/${encodeURIComponent(id)}/image${frame === null ? "" : `?frame=${frame}`}`).then(
    (url) => {
      image.src = url;
      image.classList.remove("pending");
    },
    (problem) => image.replaceWith(h("span", { class: "missing", title: problem.message }, "not shown")),
  );
  return image;
}

function guidance({ guidance_scale, guidance: curve }) {
  return curve ? `${curve.minimum} to ${curve.maximum}, a = ${curve.a}, b = ${curve.b}` : String(guidance_scale);
}

function provenance(one, source) {
  const { sample } = one;
  const nearest = sample.nearest_real;
  const begins = sample.frames === null ? sample.source_id : (sample.init_id ?? sample.source_id);
  const rows = [
    ["class", sample.class_name],
    ["prompt", sample.prompt],
    ["negative prompt", sample.negative_prompt],
    ["action units", sample.action_units.join(", ") || null],
    ["seed", sample.seed],
    ["weights", `${sample.weights.name}@${sample.weights.version} (${sample.weights.digest.slice(0, 12)})`],
    ["strength", sample.frames === null ? String(sample.strength) : null],
    ["frames", sample.frames === null ? null : `${sample.frames}${sample.fps === null ? "" : `, ${sample.fps} a second`}`],
    ["guidance", guidance(sample)],
    ["steps", `${sample.steps}, ${sample.scheduler}`],
    ["chosen by", sample.policy ? "the policy of the weights" : null],
    ["source", sample.source_id],
    ["begins with", sample.frames === null ? null : sample.init_id],
    ["source's score", source.score === null ? null : source.score.toFixed(4)],
    ["feedback", `${sample.feedback}, of the model after ${plural(sample.model_version, "update")}`],
    ["nearest real", nearest],
    ["distance to it", sample.nearest_distance === null ? null : `${sample.nearest_distance.toFixed(4)}${sample.near_copy ? ", a near copy" : ""}`],
    ["made", date(sample.created)],
    ["sample", sample.id],
  ];
  const pair = (image, text) => h("figure", {}, image, h("figcaption", {}, text));
  return [
    h(
      "div",
      { class: "pictures" },
      pair(real(begins, "the real sample it was made from", sample.init_frame), sample.frames === null ? "made from" : "begins with"),
      pair(h("img", { src: inline(one), alt: "the synthetic sample" }), "made"),
      nearest && pair(real(nearest, "the real sample it resembles most"), "nearest real"),
    ),
    h("dl", { class: "provenance" }, rows.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]).flat()),
  ];
}

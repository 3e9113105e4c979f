// Elements out of data. Text is only ever set as text: names come from datasets and settings, and are not trusted.

const SVG = "http://www.w3.org/2000/svg";

function build(node, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const h = (tag, properties, ...children) => build(document.createElement(tag), properties, children);
export const s = (tag, properties, ...children) => build(document.createElementNS(SVG, tag), properties, children);
export const byId = (id) => document.getElementById(id);

const painted = new WeakMap();

// Fill a node anew when what it shows has changed; what has the focus keeps it, by its data-key.
export function paint(node, shown, make) {
  const now = JSON.stringify(shown);
  if (painted.get(node) === now) return;
  painted.set(node, now);
  const key = node.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const open = [...node.querySelectorAll("details[open]")].map((details) => details.dataset.key);
  node.replaceChildren(...[make()].flat().filter(Boolean));
  for (const details of node.querySelectorAll("details")) details.open = open.includes(details.dataset.key);
  if (key) focusOn(key, node);
}

export function focusOn(key, within = document) {
  within.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

// ---------------------------------------------------------------- numbers and times

const whole = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

export const count = (number) => whole.format(number);
export const percent = (part, digits = 0) => (part === null ? "–" : `${(100 * part).toFixed(digits)} %`);
export const timeOfDay = (seconds) => clock.format(new Date(1000 * seconds));
export const date = (seconds) => day.format(new Date(1000 * seconds));
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

// The service's HTTP interface: JSON, problems, the key, small pictures.

const KEY = "onthefly-key"; // in sessionStorage: gone with the tab
const TIMEOUT_MS = 8000;
const PICTURES = 400; // kept
const pictures = new Map(); // path -> promise of a data URL

export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Status 0: no answer at all.
async function send(method, path, body, timeout = TIMEOUT_MS) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const request = { method, headers, cache: "no-cache", signal: AbortSignal.timeout(timeout) };
  let answer;
  try {
    answer = await fetch(path, { ...request, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Problem(0, "the service does not answer");
  }
  noteClock(answer.headers.get("Date"));
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, problem.detail ?? `the service answered with status ${answer.status}`);
}

// Seeds have 63 bits, and numbers here 53: they are kept as text.
const exact = (text) => JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed":"$1"'));

export const get = async (path) => exact(await (await send("GET", path)).text());
export const post = async (path, body, timeout) => (await send("POST", path, body, timeout)).json();
export const remove = async (path) => (await send("DELETE", path)).json();
export const useKey = (key) => sessionStorage.setItem(KEY, key);

// An <img> cannot send the key, so pictures are fetched and shown as data URLs.
export function picture(path) {
  if (!pictures.has(path)) {
    if (pictures.size >= PICTURES) pictures.delete(pictures.keys().next().value);
    const url = send("GET", path).then((answer) => answer.blob()).then(dataUrl);
    url.catch((problem) => problem.status !== 404 && pictures.delete(path)); // what is not there stays away
    pictures.set(path, url);
  }
  return pictures.get(path);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// The service's clock, by which ages are told: this machine's may be off.
let aheadMs = 0;

function noteClock(header) {
  const then = Date.parse(header ?? "");
  if (!Number.isNaN(then) && Math.abs(then - Date.now() - aheadMs) > 2000) aheadMs = then - Date.now();
}

export const now = () => (Date.now() + aheadMs) / 1000;

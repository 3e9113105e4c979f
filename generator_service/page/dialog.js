// The page's one dialog, and its one line of what came of an action.

import { byId, focusOn, h } from "/page/dom.js";

const SAID_MS = 8000;
let silence = 0;

// Show a dialog; resolves to whether it was confirmed. `confirm`: text of that button; none for something to look at.
export function ask({ title, body, confirm, wide }) {
  const dialog = byId("dialog");
  if (dialog.open) dialog.close("");
  const opener = document.activeElement?.dataset?.key;
  const close = (value) => () => dialog.close(value);
  dialog.className = wide ? "wide" : "";
  dialog.replaceChildren(
    h("h2", { id: "dialog-title" }, title),
    ...[body].flat().filter(Boolean),
    h("div", { class: "actions" }, h("button", { onclick: close("") }, confirm ? "Cancel" : "Close"), confirm && h("button", { class: "main", onclick: close("yes") }, confirm)),
  );
  dialog.returnValue = "";
  dialog.onclick = (event) => event.target === dialog && dialog.close("");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      if (opener) focusOn(opener);
      resolve(dialog.returnValue === "yes");
    };
  });
}

// Ask for the service's key; resolves to it.
export function askKey(title = "This service asks for a key") {
  const dialog = byId("dialog");
  const input = h("input", { id: "key", type: "password", required: true, autocomplete: "off", spellcheck: "false" });
  const submit = (event) => {
    event.preventDefault();
    dialog.close("yes");
  };
  dialog.className = "";
  dialog.onclick = null;
  dialog.replaceChildren(
    h("form", { onsubmit: submit }, h("h2", { id: "dialog-title" }, title), h("label", { for: "key" }, "API key"), input, h("p", { class: "note" }, "It is kept until this tab is closed."), h("div", { class: "actions" }, h("button", { class: "main" }, "Use it"))),
  );
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(input.value);
  });
}

export function say(text, bad = false) {
  const line = byId("said");
  line.textContent = text;
  line.className = `said shown${bad ? " bad" : ""}`;
  clearTimeout(silence);
  silence = setTimeout(() => line.classList.remove("shown"), SAID_MS);
}

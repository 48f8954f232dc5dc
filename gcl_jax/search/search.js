"use strict";

// Whatever comes from the store or from the user enters the page as text, never as markup.

const $ = (id) => document.getElementById(id);
let info;
let image = null; // the File asked for, instead of a text
let pending = new AbortController();

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

async function fetched(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
  // What the server refuses before it reads it (a header too long) is told in HTML.
  const answer = await response.json().catch(() => ({ error: response.statusText }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function show(id, shown) {
  $(id).hidden = !shown;
}

function fail(message) {
  $("error").textContent = message;
  show("error", true);
  $("status").textContent = "";
  $("runs").replaceChildren();
}

// Searches for the image, if there is one, else for the text.
async function search() {
  pending.abort();
  pending = new AbortController();
  const text = $("query").value.trim();
  show("error", false);
  show("empty", !image && !text);
  show("asked", false);
  $("status").textContent = "";
  document.title = (image ? "image" : text) || "gcl_jax search";
  if (!image && !text) return $("runs").replaceChildren();
  if (image && image.size > info.max_bytes) {
    return fail(`the image has ${(image.size / 2 ** 20).toFixed(1)} MiB; at most ${info.max_bytes / 2 ** 20}`);
  }
  const parameters = new URLSearchParams(image ? {} : { q: text });
  parameters.set("k", $("k").value);
  const options = image ? { method: "POST", body: image } : {};
  const start = performance.now();
  $("runs").classList.add("busy");
  try {
    const answer = await fetched(`/api/search?${parameters}`, { ...options, signal: pending.signal });
    present(answer);
    const count = answer.runs[0].results.length;
    const took = Math.round(performance.now() - start);
    $("status").textContent = `${count} of ${info.documents.toLocaleString("en")} documents in ${took} ms`;
    $("status").dataset.milliseconds = took;
  } catch (error) {
    if (error.name === "AbortError") return;
    fail(error.message);
  }
  $("runs").classList.remove("busy");
}

function present(answer) {
  if (image) {
    URL.revokeObjectURL($("preview").src);
    $("preview").src = URL.createObjectURL(image);
    show("asked", true);
  }
  const first = new Map(answer.runs[0].results.map((result) => [result.row, result.rank]));
  $("runs").replaceChildren(...answer.runs.map((run, number) => {
    const pictures = run.results.some((result) => result.images.length);
    return element("section", { class: "run", "aria-label": run.name },
      element("h2", {}, run.name, element("span", { class: "soft" },
        `step ${info.runs[number].step.toLocaleString("en")} · ${run.milliseconds} ms`)),
      element("ol", pictures ? {} : { class: "texts" },
        ...run.results.map((result) => card(result, number && moved(result, first)))));
  }));
}

function card(result, movement) {
  const title = Object.values(result.fields).join(" · ") || result.id;
  const pictures = result.images.map((address) =>
    element("a", { href: address, target: "_blank", rel: "noopener" },
      element("img", { src: address, alt: title })));
  return element("li", { "data-row": result.row, title },
    ...pictures,
    element("div", { class: "line" }, element("b", {}, String(result.rank)), movement || "",
      element("span", {}, result.score.toFixed(3))),
    element("p", { class: "title" }, title));
}

// How far a result is from its place in the first run.
function moved(result, first) {
  const rank = first.get(result.row);
  if (rank === undefined) return element("span", { class: "moved" }, "new");
  if (rank === result.rank) return element("span", { class: "moved" }, "=");
  const up = rank > result.rank;
  return element("span", { class: `moved ${up ? "up" : "down"}` },
    `${up ? "▲" : "▼"}${Math.abs(rank - result.rank)}`);
}

// The same document is marked in all runs.
function mark(event) {
  const row = event.target.closest?.("li")?.dataset.row;
  const several = info?.runs.length > 1;
  for (const item of document.querySelectorAll("#runs li")) {
    item.classList.toggle("same", several && item.dataset.row === row);
  }
}

// A text query is in the address: it can be shared, and the browser goes back to it.
function ask(newImage = null) {
  image = newImage;
  const text = image ? "" : $("query").value.trim();
  $("query").value = text;
  const parameters = new URLSearchParams({ ...(text && { q: text }), k: $("k").value });
  if (`?${parameters}` !== location.search) history.pushState(null, "", `/?${parameters}`);
  search();
}

function fromAddress() {
  const parameters = new URLSearchParams(location.search);
  image = null;
  $("query").value = parameters.get("q") ?? "";
  const k = parameters.get("k") ?? "10";
  // Any number may stand in the address; the server says if it is none.
  if (![...$("k").options].some((option) => option.value === k)) $("k").append(element("option", {}, k));
  $("k").value = k;
  search();
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask($("query").value.trim() ? null : image);
  });
  $("k").addEventListener("change", () => ask(image));
  $("file").addEventListener("change", () => {
    if ($("file").files.length) ask($("file").files[0]);
    $("file").value = "";
  });
  $("clear").addEventListener("click", () => {
    ask();
    $("query").focus();
  });
  window.addEventListener("popstate", fromAddress);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.matches("input, select")) {
      event.preventDefault();
      $("query").select();
    }
  });
  for (const name of ["mouseover", "focusin"]) $("runs").addEventListener(name, mark);
  $("runs").addEventListener("mouseleave", mark);
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dragging", name === "dragover");
    });
  }
  document.addEventListener("drop", (event) => given(event.dataTransfer.files));
  document.addEventListener("paste", (event) => given(event.clipboardData.files));
}

function given(files) {
  if (!files.length) return;
  if (info.images) ask(files[0]);
  else fail("this model has no image tower: search by a text");
}

async function main() {
  try {
    info = await fetched("/api/info");
  } catch (error) {
    return fail(error.message);
  }
  $("store").textContent = info.store;
  show("picker", info.images);
  show("or-image", info.images);
  $("examples").append(...info.examples.map((text) =>
    element("a", { href: `/?${new URLSearchParams({ q: text })}` }, text)));
  listen();
  fromAddress();
}

main();

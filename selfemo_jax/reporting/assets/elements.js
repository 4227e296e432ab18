"use strict";
// Everything of a run becomes text nodes; no string of a run is ever parsed as markup.

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

function fixed(value, digits = 3) {
  return typeof value === "number" ? value.toFixed(digits) : "-";
}

function percent(value, digits = 1) {
  return typeof value === "number" ? (100 * value).toFixed(digits) : "-";
}

function short(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "-" : String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function seconds(value) {
  if (value >= 3600) return `${(value / 3600).toFixed(1)} h`;
  return value >= 60 ? `${(value / 60).toFixed(1)} min` : `${value.toFixed(1)} s`;
}

function weights(labels) {
  return Object.entries(labels || {}).map(([label, weight]) => `${label} ${fixed(weight, 2)}`).join(", ");
}

// What a run is worth is said wherever its numbers stand.
function notes(runs) {
  const found = [...new Set(runs.map((run) => run.note).filter(Boolean))];
  return found.map((note) => h("span", { class: "note" }, note));
}

function runName(run, place) {
  return h("span", { class: "run" },
    h("i", { class: "dot", style: { background: `var(--c${place % 8})` } }), run.label);
}

function panel(title, runs, ...content) {
  return h("figure", { class: "panel" }, h("figcaption", {}, h("b", {}, title), " ", notes(runs)), ...content);
}

function section(id, title, about, ...content) {
  const element = h("section", { id }, h("h2", {}, title), about ? h("p", { class: "about" }, about) : null);
  add(element, content);
  return element;
}

// Columns: {name, cell(row), numeric}. With stack, a row becomes a card on a narrow screen.
function table(columns, rows, { stack = false } = {}) {
  return h("div", { class: "scroll" }, h("table", { class: stack ? "stack" : "" },
    h("thead", {}, h("tr", {}, columns.map((column) => h("th", { class: column.numeric ? "num" : "" }, column.name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, columns.map((column) =>
      h("td", { class: column.numeric ? "num" : "", "data-name": column.name }, h("span", {}, column.cell(row)))))))));
}

function choice(name, options, changed, selected) {
  const select = h("select", { name, "aria-label": name, onchange: () => changed(select.value) },
    options.map((option) => {
      const [value, text] = Array.isArray(option) ? option : [option, option];
      return h("option", { value, selected: String(value) === String(selected) }, text);
    }));
  return select;
}

function field(text, control) {
  return h("label", { class: "field" }, h("span", {}, text), control);
}

// A part of the page that is built when it is about to be seen.
function lazily(element, build) {
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    build();
  }, { rootMargin: "400px" });
  observer.observe(element);
  return element;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64), bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place++) bytes[place] = binary.charCodeAt(place);
  return bytes;
}

async function decode(element) {
  const stream = new Blob([bytesOf(element.textContent.trim())]).stream();
  element.textContent = "";
  const text = await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).text();
  return JSON.parse(text);
}

// The rollout browser: columns in memory, a filter over all of them, and only the visible rows in the page.

const store = { group: [], idx: [], text: [], lower: [], predicted: [], codes: [], valid: [], finish: [], r1: [], r2: [], R: [], advantage: [], groups: [], first: [] };
const filters = { text: "", run: "", dataset: "", phase: "", origin: "", answer: "", gold: "", predicted: "", code: "", least: "", order: "step" };
let shown = new Int32Array(0), orders = {}, browser = null;

function takeBlock(block, runs) {
  const base = store.groups.length, groups = block.groups;
  for (let place = 0; place < groups.step.length; place++) {
    const gold = Object.keys(groups.gold[place])[0] || "";
    const history = groups.history[place];
    store.groups.push({ run: block.run, step: groups.step[place], sample: groups.sample[place], dataset: groups.dataset[place],
      origin: groups.origin[place], history, gold: groups.gold[place], label: gold, version: groups.version[place],
      phase: phaseOf(runs[block.run], groups.step[place]),
      lower: `${groups.sample[place]} ${history.map((turn) => turn.join(": ")).join(" ")}`.toLowerCase() });
    store.first.push(-1);
  }
  const rows = block.rows;
  for (let place = 0; place < rows.idx.length; place++) {
    const group = base + rows.group[place];
    if (store.first[group] < 0) store.first[group] = store.text.length;
    store.group.push(group);
    store.lower.push(rows.text[place].toLowerCase());
    for (const name of ["idx", "text", "predicted", "codes", "valid", "finish", "r1", "r2", "R", "advantage"]) store[name].push(rows[name][place]);
  }
  orders = {};
}

function phaseOf(run, step) {
  const found = run.phases.find((phase) => step >= phase.first && step <= phase.last);
  return found ? found.name : "";
}

const ORDERS = {
  step: null, "newest first": (a, b) => store.groups[store.group[b]].step - store.groups[store.group[a]].step || a - b,
  "best R": (a, b) => store.R[b] - store.R[a] || a - b,
  "worst R": (a, b) => store.R[a] - store.R[b] || a - b,
  "largest advantage": (a, b) => store.advantage[b] - store.advantage[a] || a - b,
  "longest": (a, b) => store.text[b].length - store.text[a].length || a - b,
};

function ordered(name) {
  if (!orders[name]) {
    const order = Int32Array.from({ length: store.text.length }, (_, place) => place);
    if (ORDERS[name]) order.sort(ORDERS[name]);
    orders[name] = order;
  }
  return orders[name];
}

// Two passes: what is asked of a prompt is asked once for its whole group.
function filterRows() {
  const wanted = filters, query = wanted.text.trim().toLowerCase(), count = store.groups.length;
  const open = new Uint8Array(count), said = new Uint8Array(count), mixed = wanted.answer === "disagree" ? disagreeing() : null;
  for (let place = 0; place < count; place++) {
    const group = store.groups[place];
    open[place] = (wanted.run === "" || group.run === +wanted.run) && (!wanted.dataset || group.dataset === wanted.dataset)
      && (!wanted.phase || group.phase === wanted.phase) && (!wanted.origin || group.origin === wanted.origin)
      && (!wanted.gold || group.label === wanted.gold) && (!mixed || mixed[place]) ? 1 : 0;
    said[place] = open[place] && query && group.lower.includes(query) ? 1 : 0;
  }
  const order = ordered(wanted.order), found = new Int32Array(order.length), least = wanted.least === "" ? null : +wanted.least;
  let length = 0;
  for (let place = 0; place < order.length; place++) {
    const row = order[place], group = store.group[row];
    if (!open[group]) continue;
    if (wanted.answer === "valid" && !store.valid[row] || wanted.answer === "malformed" && store.valid[row]) continue;
    if (wanted.answer === "right" && store.predicted[row] !== store.groups[group].label) continue;
    if (wanted.answer === "wrong" && store.predicted[row] === store.groups[group].label) continue;
    if (wanted.predicted && store.predicted[row] !== wanted.predicted) continue;
    if (wanted.code && !` ${store.codes[row]} `.includes(` ${wanted.code} `)) continue;
    if (least !== null && !(store.r1[row] >= least)) continue;
    if (query && !said[group] && !store.lower[row].includes(query)) continue;
    found[length++] = row;
  }
  return found.subarray(0, length);
}

// Groups whose valid rollouts do not name the same heaviest label.
function disagreeing() {
  const label = new Array(store.groups.length).fill(null), found = new Uint8Array(store.groups.length);
  for (let row = 0; row < store.text.length; row++) {
    if (!store.valid[row]) continue;
    const group = store.group[row];
    if (label[group] === null) label[group] = store.predicted[row];
    else if (label[group] !== store.predicted[row]) found[group] = 1;
  }
  return found;
}

function rolloutSection(report) {
  if (!report.runs.some((run) => run.num_rollouts)) return null;
  const runs = report.runs, list = h("div", { class: "list", tabindex: "0", "aria-label": "Rollouts" });
  const space = h("div", { class: "space" }), count = h("span", { id: "count" }), loading = h("span", { id: "loaded" });
  list.append(space);
  const selects = h("div", { class: "controls" });
  browser = { list, space, count, loading, selects, runs, height: 62, asked: false };
  list.addEventListener("scroll", () => ask(false));
  new ResizeObserver(() => { if (browser.width !== list.clientWidth) { browser.width = list.clientWidth; ask(false); } }).observe(list);
  const search = h("input", { type: "search", id: "search", placeholder: "words of an answer, of the dialogue, or an input's id",
    oninput: (event) => { filters.text = event.target.value; ask(true); } });
  fillChoices();
  return section("rollouts", "Rollouts", "Every recorded rollout as it was sampled. A row opens its prompt with the whole group.",
    h("figure", { class: "panel" },
      h("figcaption", {}, h("b", {}, "Rollout browser"), " ", notes(runs)),
      h("div", { class: "controls" }, h("label", { class: "field search" }, h("span", {}, "Search"), search)),
      h("details", { open: !matchMedia("(max-width: 640px)").matches }, h("summary", {}, "Filters and order"), selects),
      h("p", { class: "count" }, count, loading), list));
}

function fillChoices() {
  const of = (values) => [["", "all"], ...[...new Set(values)].filter(Boolean).sort().map((value) => [value, value])];
  const { runs, selects } = browser;
  const make = (title, name, options) => field(title, choice(name, options, (value) => { filters[name] = value; ask(true); }, filters[name]));
  const codes = new Set();
  for (const some of new Set(store.codes)) for (const code of some.split(" ")) codes.add(code);
  selects.replaceChildren(...[
    runs.length > 1 ? make("Run", "run", [["", "all"], ...runs.map((run, place) => [String(place), run.label])]) : null,
    make("Answer", "answer", [["", "all"], "valid", "malformed", "right", "wrong", ["disagree", "group disagrees"]]),
    make("Data set", "dataset", of(store.groups.map((group) => group.dataset))),
    make("Phase", "phase", of(store.groups.map((group) => group.phase))),
    make("Origin", "origin", of(store.groups.map((group) => group.origin))),
    make("Gold", "gold", of(store.groups.map((group) => group.label))),
    make("Predicted", "predicted", of(commonest(store.predicted, 40))),
    make("Code", "code", of([...codes])),
    make("r1 at least", "least", [["", "any"], "0.25", "0.5", "0.75", "1"]),
    make("Order", "order", Object.keys(ORDERS)),
  ].filter(Boolean));
}

// A policy that is still learning writes thousands of labels.
function commonest(values, most) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, most).map((pair) => pair[0]);
}

function ask(again) {
  browser.again = browser.again || again;
  if (browser.asked) return;
  browser.asked = true;
  requestAnimationFrame(() => {
    browser.asked = false;
    if (browser.again) {
      const start = performance.now();
      shown = filterRows();
      const spent = performance.now() - start;
      browser.again = false;
      browser.list.scrollTop = 0;
      browser.count.textContent = `${shown.length.toLocaleString("en")} of ${store.text.length.toLocaleString("en")} rollouts, found in ${spent.toFixed(0)} ms`;
    }
    drawRows();
  });
}

function drawRows() {
  const { list, space } = browser;
  browser.height = matchMedia("(max-width: 640px)").matches ? 84 : 62;
  space.style.height = `${shown.length * browser.height}px`;
  const from = Math.max(0, Math.floor(list.scrollTop / browser.height) - 3);
  const until = Math.min(shown.length, from + Math.ceil(list.clientHeight / browser.height) + 7);
  const rows = [];
  for (let place = from; place < until; place++) rows.push(rowElement(shown[place], place));
  space.replaceChildren(...rows);
}

function rowElement(row, place) {
  const group = store.groups[store.group[row]], several = browser.runs.length > 1;
  return h("button", { class: "row", style: { top: `${place * browser.height}px` }, "data-row": row, onclick: () => openGroup(row) },
    h("div", { class: "facts" },
      several ? [h("i", { class: "dot", style: { background: `var(--c${group.run % 8})` } }), " "] : null,
      h("b", {}, `R ${fixed(store.R[row], 2)}`), ` · r1 ${fixed(store.r1[row], 2)} · r2 ${fixed(store.r2[row], 2)} · A ${fixed(store.advantage[row], 2)} · `,
      h("span", { class: store.valid[row] ? "" : "invalid" }, store.valid[row] ? `${store.predicted[row]} / gold ${group.label}` : store.codes[row] || "malformed"),
      ` · step ${group.step} #${store.idx[row]} · ${group.dataset}`),
    h("div", { class: "words" }, wordsOf(row)));
}

// The row leaves out the tags of a well-formed answer; its prompt shows what was sampled.
function wordsOf(row) {
  const text = store.valid[row] ? store.text[row].replace(/<self_emotion>/g, "| ").replace(/<response>/g, "| ").replace(/<\/?(emotion|self_emotion|response)>/g, "") : store.text[row];
  return text.replace(/\s+/g, " ");
}

function openGroup(row) {
  const place = store.group[row], group = store.groups[place], run = browser.runs[group.run], answers = [];
  for (let one = store.first[place]; one < store.text.length && store.group[one] === place; one++) answers.push(one);
  const detail = document.getElementById("detail");
  detail.replaceChildren();
  add(detail, [
    h("button", { class: "close", onclick: () => detail.close() }, "Close"),
    h("h3", {}, `${group.sample}, step ${group.step}`), h("p", {}, runName(run, group.run), " ", notes([run])),
    h("p", { class: "muted" }, `${group.phase} · ${group.origin} · sampled by policy version ${group.version} · gold ${weights(group.gold)}`),
    talk(group.history.map(([speaker, text]) => ({ speaker, text }))),
    answers.map((one) => h("div", { class: one === row ? "answer chosen" : "answer" },
      h("div", { class: "muted" }, `#${store.idx[one]} · R ${fixed(store.R[one])} · r1 ${fixed(store.r1[one])} · r2 ${fixed(store.r2[one])} · advantage ${fixed(store.advantage[one])} · ${store.finish[one]} `,
        store.codes[one] ? h("span", { class: store.valid[one] ? "" : "invalid" }, store.codes[one]) : null),
      h("pre", {}, store.text[one])))]);
  detail.showModal();
  detail.scrollTop = 0;
}

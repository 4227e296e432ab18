// Self-play as conversations: the original context, the generated turns, and how the dialogue ended.

function talk(turns) {
  const speakers = [...new Set(turns.map((turn) => turn.speaker))];
  return h("div", { class: "talk" }, turns.map((turn) => {
    if (turn.mark) return h("div", { class: "mark" }, turn.mark);
    const place = speakers.indexOf(turn.speaker);
    return h("div", { class: `turn ${place % 2 ? "right" : ""} ${turn.kind || ""}` },
      h("div", { class: "who", style: { color: `var(--c${place % 8})` } }, turn.speaker),
      h("div", {}, turn.text),
      turn.facts ? turn.facts.filter(Boolean).map((fact) => h("div", { class: "facts" }, fact)) : null);
  }));
}

function factsOf(turn) {
  const rewards = Object.entries(turn.rewards).map(([name, value]) => `${name} ${short(value)}`).join(" · ");
  return [
    Object.keys(turn.recognised).length ? `reads the turn before as ${weights(turn.recognised)}` : null,
    Object.keys(turn.declared).length ? `declares ${weights(turn.declared)}` : null,
    rewards ? `${rewards} · policy ${short(turn.version)}` : null,
  ];
}

function dialogueCard(dialogue, run, place) {
  const turns = dialogue.context.map(([speaker, text]) => ({ speaker, text }));
  turns.push({ mark: "the policy plays on" });
  for (const turn of dialogue.turns) turns.push({ ...turn, kind: "made", facts: factsOf(turn) });
  if (dialogue.ending) {
    turns.push({ mark: `rejected: ${dialogue.ending.reason}` });
    turns.push({ ...dialogue.ending, kind: "ended", facts: factsOf(dialogue.ending) });
  }
  return h("figure", { class: "panel" },
    h("figcaption", {}, runName(run, place), h("b", {}, dialogue.id), notes([run])),
    h("p", { class: "muted" }, [dialogue.theme, `harvest ${short(dialogue.iteration)}`, `${dialogue.turns.length} generated turn${dialogue.turns.length === 1 ? "" : "s"}`]
      .filter(Boolean).join(" · ")),
    talk(turns));
}

function dialogueSection(report, dialogues) {
  const all = [];
  dialogues.forEach((some, place) => some.forEach((dialogue) => all.push({ dialogue, place,
    lower: [dialogue.id, dialogue.theme || "", ...dialogue.context.map((turn) => turn[1]), ...dialogue.turns.map((turn) => turn.text)].join(" ").toLowerCase() })));
  const harvests = report.runs.flatMap((run, place) => run.harvests.map((harvest) => ({ run, place, ...harvest })));
  if (!all.length && !harvests.length) return null;
  const grid = h("div", { class: "grid" }), count = h("p", { class: "muted" }), more = h("button", {}, "Show more");
  const wanted = { text: "", turns: "" };
  let found = [], length = 0;
  const extend = () => {
    const next = found.slice(length, length + 12);
    length += next.length;
    grid.append(...next.map((one) => dialogueCard(one.dialogue, report.runs[one.place], one.place)));
    more.hidden = length >= found.length;
    count.textContent = `${found.length.toLocaleString("en")} dialogues, ${length.toLocaleString("en")} shown`;
  };
  const show = () => {
    found = all.filter((one) => one.lower.includes(wanted.text.toLowerCase()) && (!wanted.turns || one.dialogue.turns.length >= +wanted.turns));
    length = 0;
    grid.replaceChildren();
    extend();
  };
  more.addEventListener("click", extend);
  const longest = Math.max(1, ...all.map((one) => one.dialogue.turns.length));
  const controls = h("div", { class: "controls" },
    h("label", { class: "field search" }, h("span", {}, "Search"), h("input", { type: "search", oninput: (event) => { wanted.text = event.target.value; show(); } })),
    longest > 1 ? field("Generated turns", choice("turns", [["", "any"], ...Array.from({ length: longest - 1 }, (_, place) => [String(place + 2), `at least ${place + 2}`])],
      (value) => { wanted.turns = value; show(); })) : null);
  const element = section("selfplay", "Self-play", "Dialogues that the policy played on. Framed turns are generated; what they declare became the gold label of the next input.",
    harvests.map((harvest) => harvestPanel(harvest)), all.length ? [controls, count, grid, h("p", {}, more)] : null);
  if (all.length) show();
  return element;
}

function harvestPanel(harvest) {
  const labels = harvest.labels || {}, kinds = Object.keys(labels).filter((kind) => Object.keys(labels[kind]).length);
  const sets = [...new Set(kinds.flatMap((kind) => Object.keys(labels[kind])))];
  const tables = sets.map((set) => {
    const names = [...new Set(kinds.flatMap((kind) => Object.keys(labels[kind][set] || {})))];
    return table([{ name: set, cell: (name) => name },
      ...kinds.map((kind) => ({ name: kind, numeric: true, cell: (name) => percent((labels[kind][set] || {})[name] || 0) }))], names);
  });
  const divergence = Object.entries(harvest.divergence || {}).map(([name, value]) => `${name} ${fixed(value)}`).join(", ");
  const facts = [
    ["proposed", short(harvest.proposed)], ["accepted", short(harvest.accepted)],
    ["rejected", Object.entries(harvest.rejected || {}).map(([name, value]) => `${name} ${short(value)}`).join(", ") || "none"],
    ["for training / held out", `${short(harvest.training)} / ${short(harvest.heldout)}`],
    ["divergence from human labels, bits", divergence || "-"],
  ];
  return h("figure", { class: "panel" },
    h("figcaption", {}, runName(harvest.run, harvest.place), h("b", {}, `harvest of ${harvest.phase}`), notes([harvest.run])),
    h("dl", {}, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    tables.length ? h("details", {}, h("summary", {}, "labels in percent: human, recognised, declared, accepted, in training"), h("div", { class: "grid" }, tables)) : null);
}

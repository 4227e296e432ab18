// How the confusion on dev changes from phase to phase.

function changeSection(report) {
  const runs = report.runs.filter((run) => run.changes.length);
  if (!runs.length) return null;
  const body = h("div"), stepBox = h("span");
  let run = runs[0], step = null;
  const steps = () => [...new Set(run.changes.map(stepName))];
  const show = () => body.replaceChildren(...changeParts(run, run.changes.filter((one) => stepName(one) === step)));
  const chooseRun = () => {
    step = steps().at(-1);
    stepBox.replaceChildren(field("From and to", choice("change", steps(), (value) => { step = value; show(); }, step)));
    show();
  };
  chooseRun();
  return section("changes", "Confusion by iteration",
    "The same dev inputs answered at the end of two phases. Rows: gold; columns: predicted. Green: more right answers or fewer of an error; red: the opposite; shade: share of the row. "
    + "A pair raises an alarm when more of its errors came than went and Holm's p of the exact McNemar test, over all pairs of all sets, is below 0.05.",
    h("div", { class: "controls" },
      runs.length > 1 ? field("Run", choice("run of changes", runs.map((one) => one.label), (value) => { run = runs.find((one) => one.label === value); chooseRun(); })) : null,
      stepBox),
    body);
}

function stepName(one) {
  return `${one.from} to ${one.to}`;
}

function changeParts(run, sets) {
  const of = (kind, one, other) => sets.flatMap((change) => change[kind].map((row) => ({ set: change.set, ...row })))
    .sort((a, b) => a.p - b.p || b[one] + b[other] - a[one] - a[other]);
  const pairs = of("pairs", "came", "went"), flows = of("flows", "moved", "back"), alarms = pairs.filter((row) => row.alarm), most = 8;
  const tested = [
    { name: "p", numeric: true, cell: (row) => short(row.p) },
    { name: "Holm's p", numeric: true, cell: (row) => short(row.p_holm) },
  ];
  const parts = [
    alarms.length
      ? h("p", { class: "banner" }, h("b", {}, "Alarm: "), alarms.map((row) => `${row.set}: ${row.gold} read as ${row["read as"]} ${row.before} → ${row.after}`).join("; "))
      : h("p", { class: "muted" }, "No confusion grew more than by chance."),
    h("div", { class: "grid" }, sets.map((one) => panel(`${one.set}, ${stepName(one)}, ${short(one.inputs)} inputs`, [run], changeTable(one)))),
  ];
  if (pairs.length) parts.push(panel("Errors that changed most", [run], table([
    { name: "set", cell: (row) => row.set },
    { name: "gold", cell: (row) => row.gold },
    { name: "read as", cell: (row) => row["read as"] },
    { name: "before → after", numeric: true, cell: (row) => h("span", { class: row.alarm ? "worse" : "" }, `${row.before} → ${row.after}`) },
    { name: "came / went", numeric: true, cell: (row) => `${row.came} / ${row.went}` }, ...tested,
  ], pairs.slice(0, most), { stack: true })));
  if (flows.length) parts.push(panel("Flow of answers, whatever the gold", [run], table([
    { name: "set", cell: (row) => row.set },
    { name: "out of", cell: (row) => row["out of"] },
    { name: "into", cell: (row) => row.into },
    { name: "moved / back", numeric: true, cell: (row) => `${row.moved} / ${row.back}` }, ...tested,
  ], flows.slice(0, most), { stack: true })));
  return parts;
}

function changeTable(one) {
  const heads = [...one.labels, "none"];
  return h("div", { class: "scroll" }, h("table", { class: "confusion" },
    h("thead", {}, h("tr", {}, h("th", {}, ""), heads.map((label) => h("th", { title: label }, h("span", { class: "turned" }, label))))),
    h("tbody", {}, one.after.map((row, gold) => {
      const total = one.before[gold].reduce((a, b) => a + b, 0) || 1;
      return h("tr", {}, h("th", { title: one.labels[gold] }, one.labels[gold]), row.map((number, predicted) => {
        const change = number - one.before[gold][predicted];
        const good = (gold === predicted) === (change > 0);
        return h("td", {
          title: `gold ${one.labels[gold]}, predicted ${heads[predicted]}: ${one.before[gold][predicted]} before, ${number} after`,
          style: change ? { background: `color-mix(in srgb, var(${good ? "--good" : "--bad"}) ${Math.min(75, 15 + 120 * Math.abs(change) / total).toFixed(0)}%, transparent)`, "font-weight": gold === predicted ? "700" : "400" } : {},
        }, change ? (change > 0 ? `+${change}` : `−${-change}`) : "·");
      }));
    }))));
}

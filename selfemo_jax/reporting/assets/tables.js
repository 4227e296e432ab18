// Scores, comparisons, confusions, times, studies and the run card.

function setName(row) {
  return row.part ? `${row.set}, ${row.part}` : row.set;
}

function withInterval(value, interval, show = percent) {
  return [show(value), interval ? h("span", { class: "ci" }, ` [${show(interval[0])}, ${show(interval[1])}]`) : null];
}

function scoreSection(report) {
  const runs = report.runs, rows = [];
  runs.forEach((run, place) => run.scores.forEach((score) => rows.push({ run, place, ...score })));
  if (!rows.length) return null;
  const several = runs.length > 1;
  const columns = [
    several ? { name: "run", cell: (row) => runName(row.run, row.place) } : null,
    { name: "split", cell: (row) => row.split },
    { name: "set", cell: (row) => setName(row) },
    { name: "inputs", numeric: true, cell: (row) => short(row.num) },
    { name: "weighted F1", numeric: true, cell: (row) => withInterval(row.weighted_f1, row.intervals.weighted_f1) },
    { name: "accuracy", numeric: true, cell: (row) => withInterval(row.accuracy, row.intervals.accuracy) },
    { name: "macro F1", numeric: true, cell: (row) => percent(row.macro_f1) },
    { name: "invalid", numeric: true, cell: (row) => percent(row.invalid_rate) },
    { name: "r1", numeric: true, cell: (row) => fixed(row.r1) },
    { name: "majority F1 / accuracy", numeric: true, cell: (row) => `${percent(row.majority.weighted_f1)} / ${percent(row.majority.accuracy)}` },
    several ? { name: "note", cell: (row) => notes([row.run]) } : null,
  ].filter(Boolean);
  const parts = [panel("Scores in percent", runs, table(columns, rows, { stack: true })), ...moreScores(runs, rows)];
  if (report.seeds.length) parts.push(seedTable(report));
  return section("scores", "Scores",
    `Strict: an answer outside the grammar is wrong. Brackets: 95 % intervals of a bootstrap over dialogues; none with fewer than ${report.min_dialogues}, which say too little of others.`, parts);
}

// Yardsticks, other readings, calibration and samples, each where some row has it.
function moreScores(runs, rows) {
  const where = [
    runs.length > 1 ? { name: "run", cell: (row) => runName(row.run, row.place) } : null,
    { name: "split", cell: (row) => row.split },
    { name: "set", cell: (row) => setName(row) },
  ].filter(Boolean);
  const note = runs.length > 1 ? [{ name: "note", cell: (row) => notes([row.run]) }] : [];
  const pair = (found) => found ? `${percent(found[0])} / ${percent(found[1])}` : "-";
  const spread = (found, key) => `${percent(found.mean[key])} ± ${percent(found.sd[key])}`;
  const measured = rows.filter((row) => Object.keys(row.yardsticks).length);
  const read = rows.filter((row) => typeof row.calibration.ece === "number"), drawn = rows.filter((row) => row.samples);
  const names = [...new Set(measured.flatMap((row) => Object.keys(row.yardsticks)))];
  return [
    measured.length ? panel("Beside yardsticks: weighted F1 / accuracy in percent", runs, table([...where,
      { name: "policy", numeric: true, cell: (row) => pair([row.weighted_f1, row.accuracy]) },
      ...names.map((name) => ({ name, numeric: true, cell: (row) => pair(row.yardsticks[name]) })), ...note,
    ], measured, { stack: true })) : null,
    read.length ? panel("Other readings, and weights as probabilities: F1, shares and ECE in percent", runs, table([...where,
      { name: "lenient F1", numeric: true, cell: (row) => percent(row.readings.lenient) },
      { name: "InstructERC F1", numeric: true, cell: (row) => percent(row.readings.instructerc) },
      { name: "valid", numeric: true, cell: (row) => percent(row.calibration.share) },
      { name: "confidence", numeric: true, cell: (row) => percent(row.calibration.confidence) },
      { name: "right", numeric: true, cell: (row) => percent(row.calibration.accuracy) },
      { name: "ECE", numeric: true, cell: (row) => percent(row.calibration.ece) },
      { name: "Brier (of label shares)", numeric: true, cell: (row) => `${fixed(row.calibration.brier)} (${fixed(row.calibration.brier_prior)})` },
      { name: "tokens", numeric: true, cell: (row) => fixed(row.mean_tokens, 1) }, ...note,
    ], read, { stack: true })) : null,
    drawn.length ? panel("Sampled answers, percent", runs, table([...where,
      { name: "n", numeric: true, cell: (row) => short(row.samples.n) },
      { name: "mean F1", numeric: true, cell: (row) => spread(row.samples, "weighted_f1") },
      { name: "mean accuracy", numeric: true, cell: (row) => spread(row.samples, "accuracy") },
      { name: "vote F1 / accuracy", numeric: true, cell: (row) => pair([row.samples.maj.weighted_f1, row.samples.maj.accuracy]) },
      { name: "any right", numeric: true, cell: (row) => percent(row.samples.any) },
      { name: "ECE of votes", numeric: true, cell: (row) => percent(row.samples.votes.ece) }, ...note,
    ], drawn, { stack: true })) : null,
  ].filter(Boolean);
}

function seedTable(report) {
  const show = (found) => found ? `${percent(found[0])} ± ${percent(found[1])} (n = ${found[2]})` : "-";
  return panel("Mean and standard deviation over seeds of the same settings, percent", report.runs, table([
    { name: "runs", cell: (row) => row.runs.map((place) => [runName(report.runs[place], place), " "]) },
    { name: "split", cell: (row) => row.split },
    { name: "set", cell: (row) => setName(row) },
    { name: "weighted F1", numeric: true, cell: (row) => show(row.weighted_f1) },
    { name: "accuracy", numeric: true, cell: (row) => show(row.accuracy) },
    { name: "macro F1", numeric: true, cell: (row) => show(row.macro_f1) },
  ], report.seeds, { stack: true }));
}

function comparisonSection(report) {
  const tables = report.studies.filter((one) => one.kind === "significance");
  if (!report.comparisons.length && !tables.length) return null;
  const parts = [];
  if (report.comparisons.length) {
    parts.push(panel(`Each run against ${report.runs[0].label}`, report.runs, table([
      { name: "run", cell: (row) => runName(report.runs[row.second], row.second) },
      { name: "split", cell: (row) => row.split },
      { name: "set", cell: (row) => setName(row) },
      { name: "inputs (dialogues)", numeric: true, cell: (row) => `${short(row.num)} (${short(row.dialogues)})` },
      { name: "weighted F1", numeric: true, cell: (row) => row.weighted_f1.map((value) => percent(value)).join(" to ") },
      { name: "difference", numeric: true, cell: (row) => h("span", { class: row.interval?.[0] > 0 ? "better" : row.interval?.[1] < 0 ? "worse" : "" }, withInterval(row.difference, row.interval)) },
      { name: "p bootstrap (Holm)", numeric: true, cell: (row) => `${short(row.p_bootstrap)} (${short(row.p_bootstrap_holm)})` },
      { name: "right only here / there", numeric: true, cell: (row) => `${short(row.won)} / ${short(row.lost)}` },
      { name: "p McNemar (Holm)", numeric: true, cell: (row) => `${short(row.p_mcnemar)} (${short(row.p_mcnemar_holm)})` },
    ], report.comparisons, { stack: true })));
  }
  return section("significance", "Significance",
    `Paired, on the inputs that both answered. Difference of weighted F1 with the 95 % interval of a bootstrap over dialogues (no interval and no p with fewer than ${report.min_dialogues}, which say too little of others); McNemar's exact test on accuracy; Holm's correction over the whole sets of this table.`,
    parts, tables.map((one) => studyTable(one, report.runs)));
}

function clusterSection(report) {
  const tables = report.studies.filter((one) => one.kind === "clusters");
  const maps = report.runs.map((run, place) => run.personas ? personaMap(run, place) : null).filter(Boolean);
  if (!tables.length && !maps.length) return null;
  return section("clusters", "Persona clusters", null, maps, tables.map((one) => studyTable(one, report.runs)));
}

// Personas in two dimensions; the ten largest clusters have a colour.
function personaMap(run, place) {
  const found = run.personas, make = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  const svg = make("svg"), range = [0, 1].map((axis) => {
    const values = found.points.map((point) => point[axis]), least = Math.min(...values);
    return [least, Math.max(...values) - least || 1];
  });
  const shade = (cluster) => cluster >= 0 && cluster < 10 ? `var(--c${cluster})` : "var(--muted)";
  svg.setAttribute("viewBox", "0 0 600 380");
  svg.setAttribute("class", "map");
  for (const [x, y, cluster, persona] of found.points) {
    const dot = make("circle"), title = make("title");
    title.textContent = `${found.names[cluster] || "in no cluster"}: ${persona}`;
    dot.setAttribute("cx", (10 + 580 * (x - range[0][0]) / range[0][1]).toFixed(1));
    dot.setAttribute("cy", (370 - 360 * (y - range[1][0]) / range[1][1]).toFixed(1));
    dot.setAttribute("r", "4");
    dot.style.fill = shade(cluster);
    dot.style.opacity = cluster >= 0 ? "0.8" : "0.3";
    dot.append(title);
    svg.append(dot);
  }
  const key = Object.entries(found.names).slice(0, 10).map(([cluster, name]) => h("span", { class: "run" }, h("i", { class: "dot", style: { background: shade(+cluster) } }), name));
  return h("figure", { class: "panel" },
    h("figcaption", {}, runName(run, place), h("b", {}, `${short(found.num)} personas`), notes([run])),
    found.embedding ? h("p", { class: "muted" }, found.embedding) : null, svg,
    h("div", { class: "key" }, key, h("span", { class: "run" }, h("i", { class: "dot", style: { background: shade(-1) } }), "smaller clusters, or none")));
}

function studySection(report) {
  const tables = report.studies.filter((one) => one.kind === "table");
  return tables.length ? section("studies", "Studies", null, tables.map((one) => studyTable(one, report.runs))) : null;
}

function studyTable(one, runs) {
  const at = (name) => one.columns.indexOf(name);
  const bounds = (row) => {
    if (!one.interval) return null;
    const [mean, low, high] = one.interval.map((name) => row[at(name)]);
    return Array.isArray(low) ? [mean, low[0], low[1]] : [mean, low, high];
  };
  const all = one.interval ? one.rows.flatMap(bounds).filter((value) => typeof value === "number") : [];
  const least = Math.min(...all), range = Math.max(...all) - least || 1;
  const where = (value) => `${(4 + 92 * (value - least) / range).toFixed(2)}%`;
  const beside = (name) => at(`${name} ci`), isBeside = (name) => name.endsWith(" ci") && at(name.slice(0, -3)) >= 0;
  const bracketed = (found) => h("span", { class: "ci" }, ` [${found.map(short).join(", ")}]`);
  const columns = one.columns.map((name, place) => isBeside(name) ? null : ({
    name, numeric: one.rows.some((row) => typeof row[place] === "number"),
    cell: (row) => {
      const shown = Array.isArray(row[place]) ? row[place].map(short).join(", ") : short(row[place]);
      const found = row[beside(name)];
      return Array.isArray(found) ? [shown, bracketed(found)] : shown;
    },
  })).filter(Boolean);
  if (all.length) {
    columns.push({ name: "interval", cell: (row) => {
      const found = bounds(row);
      if (!found || found.some((value) => typeof value !== "number")) return "";
      return h("div", { class: "whisker" },
        h("i", { style: { left: where(found[1]), width: `${(92 * (found[2] - found[1]) / range).toFixed(2)}%` } }),
        h("b", { style: { left: where(found[0]) } }));
    } });
  }
  const words = one.note ? [h("span", { class: "note" }, one.note)] : notes(runs);
  return h("figure", { class: "panel" },
    h("figcaption", {}, h("b", {}, one.title), " ", h("span", { class: "muted" }, one.source), " ", words),
    table(columns, one.rows, { stack: columns.length > 3 }),
    one.left_out ? h("p", { class: "muted" }, `${short(one.left_out)} more rows are in the file`) : null);
}

function confusionSection(report) {
  const runs = report.runs.filter((run) => run.scores.some((score) => score.confusion.length));
  if (!runs.length) return null;
  const grid = h("div", { class: "grid" });
  let run = runs[0], split = null;
  const splits = () => [...new Set(run.scores.filter((score) => score.confusion.length).map((score) => score.split))];
  const show = () => grid.replaceChildren(...run.scores.filter((score) => score.split === split && score.confusion.length)
    .map((score) => panel(`${run.label}, ${score.split}, ${score.set}`, [run], confusionTable(score))));
  const splitBox = h("span");
  const chooseRun = () => {
    split = splits().includes("test") ? "test" : splits()[0];
    splitBox.replaceChildren(field("Split", choice("split", splits(), (value) => { split = value; show(); }, split)));
    show();
  };
  chooseRun();
  return section("confusion", "Confusion", "Rows: gold. Columns: predicted; the last one holds answers that name no label of the set. Shade: share of the row.",
    h("div", { class: "controls" },
      runs.length > 1 ? field("Run", choice("run", runs.map((one) => one.label), (value) => { run = runs.find((one) => one.label === value); chooseRun(); })) : null,
      splitBox),
    grid);
}

function confusionTable(score) {
  const heads = [...score.labels, "none"];
  return h("div", { class: "scroll" }, h("table", { class: "confusion" },
    h("thead", {}, h("tr", {}, h("th", {}, ""), heads.map((label) => h("th", { title: label }, h("span", { class: "turned" }, label))), h("th", { title: "F1 of the class" }, "F1"))),
    h("tbody", {}, score.confusion.map((row, gold) => {
      const total = row.reduce((a, b) => a + b, 0) || 1;
      return h("tr", {}, h("th", { title: score.labels[gold] }, score.labels[gold]),
        row.map((number, predicted) => h("td", {
          title: `gold ${score.labels[gold]}, predicted ${heads[predicted]}: ${number}`,
          style: { background: `rgb(var(--heat) / ${(0.75 * number / total).toFixed(3)})`, "font-weight": gold === predicted ? "700" : "400" },
        }, number || "·")),
        h("td", {}, percent(score.f1[gold], 0)));
    }))));
}

function timeSection(report) {
  const runs = report.runs.filter((run) => run.times.length);
  if (!runs.length) return null;
  const names = [...new Set(runs.flatMap((run) => run.times.flatMap((row) => Object.keys(row.parts))))];
  const total = Math.max(...runs.flatMap((run) => run.times.map((row) => row.seconds)), 1e-9);
  const shade = (name) => name === "other" ? "var(--line)" : `var(--c${names.filter((one) => one !== "other").indexOf(name) % 10})`;
  const key = h("div", { class: "key" }, names.map((name) => h("span", { class: "run" }, h("i", { class: "dot", style: { background: shade(name) } }), name)));
  const rows = runs.flatMap((run) => run.times.map((row) => ({ run, place: report.runs.indexOf(run), ...row })));
  const bar = (row) => h("div", { class: "bars", style: { width: `${Math.max(4, 100 * row.seconds / total)}%` } },
    names.map((name) => h("i", { title: `${name}: ${seconds(row.parts[name] || 0)}`, style: { width: `${100 * (row.parts[name] || 0) / (Object.values(row.parts).reduce((a, b) => a + b, 0) || 1)}%`, background: shade(name) } })));
  const largest = (row) => Object.entries(row.parts).sort((a, b) => b[1] - a[1]).slice(0, 3)
    .map(([name, value]) => `${name} ${seconds(value)}`).join(", ");
  return section("time", "Phase times", "Wall time of the host by what it waited for; compiling is inside the part that asked for it.",
    panel("Seconds by phase", runs, key, table([
      runs.length > 1 ? { name: "run", cell: (row) => runName(row.run, row.place) } : null,
      { name: "phase", cell: (row) => row.phase },
      { name: "steps", numeric: true, cell: (row) => short(row.steps) },
      { name: "time", numeric: true, cell: (row) => seconds(row.seconds) },
      { name: "compiling", numeric: true, cell: (row) => seconds(row.compile_seconds) },
      { name: "largest parts", cell: largest },
      { name: "by part", cell: bar },
    ].filter(Boolean), rows, { stack: true })));
}

function cardSection(report) {
  const cards = report.runs.map((run, place) => h("figure", { class: "panel" },
    h("figcaption", {}, runName(run, place), notes([run])),
    h("div", { class: report.runs.length > 1 ? "" : "columns" }, run.card.map((part) => h("div", {}, h("h3", {}, part.title),
      h("dl", {}, part.entries.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))))),
    h("details", {}, h("summary", {}, "all settings"),
      h("dl", {}, Object.entries(run.settings).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])))));
  return section("card", report.runs.length > 1 ? "Run cards" : "Run card", null, differences(report), h("div", { class: report.runs.length > 1 ? "grid" : "" }, cards));
}

function differences(report) {
  if (report.runs.length < 2) return null;
  const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.settings)))]
    .filter((name) => name !== "run_dir" && new Set(report.runs.map((run) => run.settings[name])).size > 1);
  if (!names.length) return h("p", { class: "about" }, "All settings of the runs are the same.");
  const columns = [{ name: "setting", cell: (name) => name },
    ...report.runs.map((run) => ({ name: run.label, cell: (name) => run.settings[name] ?? "-" }))];
  return panel("Settings that differ", report.runs, table(columns, names, { stack: true }));
}

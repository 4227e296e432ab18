// Curves by uPlot. One run: a chart holds metrics that belong together. Several runs: a chart for each metric, a curve
// for each run.

const SMOOTHING = { none: 0, light: 0.6, strong: 0.9 };
let smoothing = SMOOTHING.light;
const drawn = new Set();

function colour(place) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--c${place % 8}`).trim();
}

function tone(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const CHARTS = [
  ["Scores on dev", [
    ["Weighted F1 on dev (strict)", /^dev\/(.+\/)?wf1$/],
    ["Accuracy on dev", /^dev\/(?!selfemo\/).+\/accuracy$/],
    ["Reward r1 on dev, greedy", /^dev\/(?!selfemo\/).+\/r1$/],
    ["Invalid answers on dev", /^dev\/(?!selfemo\/).+\/invalid$/],
    ["Held-out self-play inputs (gold declared by the policy), greedy", /^dev\/selfemo\/(accuracy|r1|invalid)$/],
  ]],
  ["Reward parts", [
    ["Reward and its parts", ["reward/total", "reward/r1", "reward/r2", "reward/lambda"]],
    ["r1 by data set", /^reward\/r1\/(?!original$|synthetic$)/],
    ["r1 by origin of the input", ["reward/r1/original", "reward/r1/synthetic"]],
    ["Entropy of what groups agree on, nats (0: all say one label)", /^group\/collapse_entropy\//],
    ["Consensus inside the groups", ["reward/r2_of_wrong", "group/zero_variance", "group/share_r2_only", "group/core_excludes_gold", "reward/r1_r2_correlation"]],
  ]],
  ["Loss", [
    ["Loss of supervised phases (nll)", ["nll"]],
    ["Policy loss", ["policy_loss"]],
    ["Gradient norm", ["grad_norm"]],
    ["Learning rate", ["lr"]],
  ]],
  ["Answers", [
    ["Valid answers", ["parse/valid", "completion/stopped"]],
    ["Errors of the grammar, share of rollouts", /^parse\/E_/],
    ["Warnings of the grammar, share of rollouts", /^parse\/W_/],
    ["Tokens of a completion", ["completion/tokens_mean", "completion/tokens_max"]],
    ["Labels of an answer", ["answer/num_labels"]],
  ]],
  ["Entropy", [
    ["Entropy of the policy, nats a token", /^entropy/],
    ["Replies: different words and pairs of words, share", /^reply\/distinct/],
    ["Replies: self-BLEU, 1 where all are alike", /^reply\/self_bleu/],
  ]],
  ["Drift", [
    ["KL to the frozen reference", ["kl"]],
    ["Step of the policy inside a batch", ["ppo_kl", "clip_fraction", "clip_fraction_dual"]],
    ["Sampler against trainer", /^rollout_gap\/|^sync\//],
    ["Labels of self-play against human ones", /drift|divergence/],
  ]],
  ["Self-play and data", [
    ["Outcome of a harvest's prompts, share", /^harvest\/(?!depth)/],
    ["Live dialogues and depth", /^(play\/|harvest\/depth)/],
    ["Inputs of a step by source", /^data\//],
    ["Lost groups", ["group/lost", "sync/dropped"]],
  ]],
  ["Speed", [
    ["Tokens trained per second", ["perf/tokens_per_s"]],
    ["Seconds of a step by part", /^time\/(?!step$)/],
    ["Seconds of a step", ["time/step"]],
    ["Peak memory so far, GiB", /^memory\//],
    ["Padding share and compilations", ["batch/padding_share", "compile/count"]],
  ]],
];

function metricNames(runs) {
  return [...new Set(runs.flatMap((run) => Object.keys(run.curves.series)))];
}

function chosenMetrics(rule, names, runs) {
  const found = Array.isArray(rule) ? rule.filter((name) => names.includes(name)) : names.filter((name) => rule.test(name));
  const most = runs.length > 1 ? 4 : 8;
  if (found.length <= most) return found;
  const mean = (name) => Math.max(...runs.map((run) => {
    const known = (run.curves.series[name] || []).filter((value) => value !== null).map(Math.abs);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : 0;
  }));
  return found.map((name) => [mean(name), name]).sort((a, b) => b[0] - a[0]).slice(0, most).map((pair) => pair[1]);
}

function curveSections(runs) {
  const names = metricNames(runs);
  const groups = [];
  for (const [title, charts] of CHARTS) {
    const figures = charts.map(([caption, rule]) => {
      const metrics = chosenMetrics(rule, names, runs);
      if (runs.length === 1) return metrics.length ? chart(caption, metrics, runs) : null;
      return metrics.map((name) => chart(metrics.length > 1 ? `${caption}: ${name}` : caption, [name], runs));
    }).flat().filter(Boolean);
    // On a phone only the first groups are open: forty charts in one column are a long way.
    const open = groups.length < 2 || !matchMedia("(max-width: 640px)").matches;
    if (figures.length) groups.push(h("details", { class: "group", id: slug(title), open }, h("summary", {}, h("h3", {}, title)), h("div", { class: "grid" }, figures)));
  }
  const any = h("div", { class: "grid wide" });
  const show = (name) => any.replaceChildren(chart(name, [name], runs));
  const pick = field("Any metric", choice("metric", names.sort(), show));
  const smooth = field("Smoothing", choice("smoothing", Object.keys(SMOOTHING), (name) => {
    smoothing = SMOOTHING[name];
    for (const redraw of drawn) redraw();
  }, "light"));
  if (names.length) show(names[0]);
  return [h("div", { class: "controls" }, smooth), groups, h("div", {}, h("h3", {}, "Any metric"), pick, any)];
}

function slug(title) {
  return title.toLowerCase().replace(/[^a-z]+/g, "-");
}

function chart(caption, metrics, runs) {
  const box = h("div", { class: "chart" });
  const figure = panel(caption, runs, box);
  let plot = null;
  const draw = () => {
    if (!figure.isConnected && plot) { drawn.delete(draw); return; }
    if (plot) plot.destroy();
    plot = plotCurves(box, metrics, runs);
  };
  lazily(box, () => {
    draw();
    drawn.add(draw);
    let width = box.clientWidth;
    new ResizeObserver(() => {
      if (box.clientWidth && box.clientWidth !== width && plot) {
        width = box.clientWidth;
        plot.setSize({ width, height: 230 });
      }
    }).observe(box);
  });
  return figure;
}

// What another phase logged does not leak into the mean.
function smoothed(values, begins) {
  let last = null;
  return values.map((value, place) => {
    if (value === null || begins.has(place)) last = null;
    if (typeof value !== "number") return value;
    last = last === null ? value : smoothing * last + (1 - smoothing) * value;
    return last;
  });
}

// Columns, and the places where a phase begins. Steps where none of the metrics was logged are left out, so that a curve fills its chart. A curve is interrupted
// (null) where a whole phase logged nothing; a step without a value inside a phase (undefined) is passed over.
function tableOf(run, metrics) {
  const all = metrics.map((name) => run.curves.series[name] || []), columns = [[], ...metrics.map(() => [])], begins = new Set();
  const place = (step) => run.phases.findIndex((phase) => step >= phase.first && step <= phase.last);
  const sparse = metrics.every((name) => name.startsWith("dev/"));
  let before = -1;
  run.curves.steps.forEach((step, index) => {
    if (!all.some((values) => typeof values[index] === "number")) return;
    const phase = place(step);
    if (before >= 0 && phase > before + 1 && !sparse) columns.forEach((column, one) => column.push(one ? null : step - 0.5));
    if (phase !== before) begins.add(columns[0].length);
    before = phase;
    columns.forEach((column, one) => column.push(one ? all[one - 1][index] ?? undefined : step));
  });
  return [columns, begins];
}

// Names without the parts that all of a chart's metrics share.
function shortNames(metrics) {
  if (metrics.length < 2) return metrics;
  const parts = metrics.map((name) => name.split("/")), least = Math.min(...parts.map((one) => one.length));
  let from = 0, until = 0;
  while (from < least - 1 && parts.every((one) => one[from] === parts[0][from])) from++;
  while (until < least - from && parts.every((one) => one.at(-1 - until) === parts[0].at(-1 - until))) until++;
  return parts.map((one) => one.slice(from, one.length - until).join("/") || "all");
}

// The mean over sets last, so that a set has the same colour in every chart.
function meanLast(metrics) {
  const mean = shortNames(metrics).indexOf("all");
  return mean < 0 ? metrics : [...metrics.filter((_, place) => place !== mean), metrics[mean]];
}

function plotCurves(box, given, runs) {
  const metrics = meanLast(given), single = runs.length === 1, names = shortNames(metrics);
  const series = [{ label: "step", value: (_, value) => value === null ? "last" : short(Math.round(value)) }], tables = [];
  runs.forEach((run, place) => {
    const [[steps, ...values], begins] = tableOf(run, metrics);
    const columns = [steps];
    values.forEach((one, index) => {
      const known = one.filter((value) => typeof value === "number").length;
      if (!known) return;
      const smooth = smoothing > 0 && known > 30;
      const stroke = colour(single ? index : place);
      const label = single ? names[index] : run.label;
      if (smooth) {
        columns.push(one);
        series.push({ label: "", stroke: `${stroke}44`, width: 1, points: { show: false }, raw: true });
      }
      columns.push(smooth ? smoothed(one, begins) : one);
      series.push({ label, stroke, width: 1.75, points: { show: known < 30, size: 5, fill: stroke },
        value: (plot, value, column, index) => short(logged(plot.data[smooth ? column - 1 : column], index, value)) });
    });
    if (columns.length > 1) tables.push(columns);
  });
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0] || [[], []];
  const axis = { stroke: tone("--muted"), grid: { stroke: tone("--line"), width: 1 }, ticks: { stroke: tone("--line"), width: 1, size: 4 },
    font: "12px system-ui, sans-serif" };
  const options = {
    width: box.clientWidth || 320, height: 230, series,
    scales: { x: { time: false }, y: { range: (_, least, most) => flatRange(least, most) } },
    axes: [{ ...axis, size: 32 }, { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => tick === null ? "" : short(+tick.toPrecision(6))) }],
    cursor: { points: { size: 6 }, drag: { x: true, y: false, dist: 6 } },
    legend: { live: true, markers: { width: 0, fill: (_, index) => series[index].stroke } },
    hooks: { drawAxes: [(plot) => drawPhases(plot, runs[0])] },
  };
  const plot = new uPlot(options, data, box);
  const rows = plot.root.querySelectorAll(".u-legend .u-series");
  series.forEach((one, index) => { if (one.raw && rows[index]) rows[index].style.display = "none"; });
  return plot;
}

// The legend tells what was logged, not what was smoothed: under the cursor, else the last value.
function logged(values, index, value) {
  return index === null ? values.findLast((one) => typeof one === "number") : values[index] ?? value;
}

function flatRange(least, most) {
  if (least === null) return [0, 1];
  if (most - least > 1e-12) return uPlot.rangeNum(least, most, 0.08, true);
  const around = Math.abs(least) * 0.1 || 0.1;
  return [least - around, most + around];
}

function drawPhases(plot, run) {
  const context = plot.ctx, { left, top, width, height } = plot.bbox;
  context.save();
  context.strokeStyle = tone("--muted");
  context.fillStyle = tone("--muted");
  context.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  context.textAlign = "left";
  context.textBaseline = "alphabetic";
  context.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
  let free = left;
  for (const phase of run.phases) {
    const x = plot.valToPos(phase.first, "x", true);
    if (x > left + 1 && x < left + width) {
      context.beginPath();
      context.moveTo(x, top);
      context.lineTo(x, top + height);
      context.stroke();
    }
    const from = Math.max(x, left), space = context.measureText(phase.name).width;
    const until = plot.valToPos(phase.last, "x", true);
    if (until > from && from >= free && from + space + 8 < left + width) {
      context.fillText(phase.name, from + 4, top + 11 * devicePixelRatio);
      free = from + space + 8;
    }
  }
  context.restore();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const redraw of drawn) redraw(); });

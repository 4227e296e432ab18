// Decode the summary, lay out the page, then decode the rollouts block by block between frames.

const pause = () => new Promise((done) => setTimeout(done, 0));

function header(report) {
  const words = [...new Set(report.runs.map((run) => run.note).filter(Boolean))];
  const notices = [...report.notices, ...report.runs.flatMap((run) => run.notices.map((notice) => report.runs.length > 1 ? `${run.label}: ${notice}` : notice))];
  document.getElementById("top").append(
    h("h1", {}, report.runs.length > 1 ? "SELF-EMO runs" : `SELF-EMO run ${report.runs[0].label}`),
    report.runs.length > 1 ? h("div", { class: "runs" }, report.runs.map((run, place) => h("span", {}, runName(run, place), " ", notes([run])))) : "",
    h("p", { class: "muted" }, [...(report.runs.length > 1 ? [] : glance(report.runs[0])), `report of ${report.made}`].join(" · ")),
    words.length ? h("p", { class: "banner" }, h("b", {}, words.join("; ")), report.runs.length > 1 ? " (the runs that are marked so)" : "") : "",
    notices.length ? h("details", { class: "muted" }, h("summary", {}, `${notices.length} notice${notices.length > 1 ? "s" : ""} about the files`), h("ul", {}, notices.map((notice) => h("li", {}, notice)))) : "");
}

// The card in one line.
function glance(run) {
  const facts = new Map(run.card.flatMap((part) => part.entries));
  const commit = facts.get("commit") === "unknown" ? null : `commit ${facts.get("commit").replace(/^([0-9a-f]{10})[0-9a-f]+/, "$1")}`;
  return [`${facts.get("steps")} steps`, facts.get("wall time of steps"), facts.get("devices"), facts.get("sets"), commit].filter(Boolean);
}

async function start() {
  const elements = [...document.querySelectorAll("script.data")];
  const of = (kind) => elements.filter((element) => element.dataset.kind === kind);
  const report = await decode(of("summary")[0]);
  const dialogues = await decode(of("dialogues")[0]);
  header(report);
  const main = document.getElementById("main");
  const sections = [
    scoreSection(report), comparisonSection(report),
    section("curves", "Curves", "Drag across a chart to zoom, double-click to go back. Faint lines are what was logged, strong ones smoothed; dashes across mark phases of the first run.", curveSections(report.runs)),
    timeSection(report), confusionSection(report), changeSection(report), clusterSection(report), studySection(report),
    dialogueSection(report, dialogues), rolloutSection(report), cardSection(report),
  ].filter(Boolean);
  document.getElementById("nav").append(h("div", {}, sections.flatMap((part) => {
    const links = [h("a", { href: `#${part.id}` }, part.querySelector("h2").textContent)];
    if (part.id === "curves") for (const name of ["reward-parts", "entropy", "drift"]) {
      const group = part.querySelector(`#${name}`);
      if (group) links.push(h("a", { href: `#${name}`, onclick: () => { group.open = true; } }, group.querySelector("h3").textContent));
    }
    return links;
  })));
  main.replaceChildren(...sections);
  document.body.append(h("footer", {}, "Made by selfemo_jax. Curves: uPlot, MIT License, (c) 2022 Leon Sorokin."));
  const blocks = of("rollouts");
  for (const [place, element] of blocks.entries()) {
    takeBlock(await decode(element), report.runs);
    element.remove();
    browser.loading.textContent = place + 1 < blocks.length ? `reading ${place + 1} of ${blocks.length} blocks` : "";
    if (place === 0 || place + 1 === blocks.length) { fillChoices(); ask(true); }
    await pause();
  }
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  document.getElementById("main").replaceChildren(h("p", { class: "banner" },
    `This report cannot be shown: ${error.message}. It needs a browser of 2023 or later.`));
  throw error;
});

"""The page as a file: one part, no network, hostile texts as data, and the words of a plumbing run."""

import base64
import gzip
import hashlib
import json
import re

import pytest

from selfemo_jax import report
from tests.report.folders import HOSTILE, NOTE, write_run

DATA = re.compile(
    r'<script type="application/gzip" class="data" data-kind="(\w+)">([A-Za-z0-9+/=]*)</script>'
)


def decoded(page: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for kind, packed in DATA.findall(page):
        found.setdefault(kind, []).append(json.loads(gzip.decompress(base64.b64decode(packed))))
    return found


def test_everything_of_a_run_is_in_the_one_file(tmp_path):
    out = report.write_report([write_run(tmp_path / "run")])
    assert out == tmp_path / "run" / "report.html"
    data = decoded(out.read_text(encoding="utf-8"))
    (summary,), (dialogues,) = data["summary"], data["dialogues"]
    assert [phase["name"] for phase in summary["runs"][0]["phases"]] == ["cold", "rl_1", "harvest_1"]
    assert summary["runs"][0]["scores"][0]["accuracy"] == 0.75
    assert summary["runs"][0]["harvests"][0]["divergence"] == {"training": 0.125}
    assert sum(len(block["rows"]["idx"]) for block in data["rollouts"]) == 24
    assert dialogues[0][0]["theme"] == "a gate"
    assert not list(out.parent.glob(".report*"))


def test_the_page_names_no_address_and_allows_only_its_own_script(tmp_path):
    page = report.write_report([write_run(tmp_path / "run")]).read_text(encoding="utf-8")
    markup = DATA.sub("", page)
    assert not re.search(
        r"(?:src|href)\s*=\s*[\"'](?!#)", re.sub(r"<script>.*</script>", "", markup, flags=re.S)
    )
    addresses = set(re.findall(r"https?://[^\s\"')]*", markup))
    names = {"https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"}
    assert addresses <= names, "the licence line of the charts and the name of SVG, which nothing loads"
    (script,) = re.findall(r"<script>(.*?)</script>", markup, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src &#39;none&#39;; script-src &#39;sha256-{digest}&#39;" in markup
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|EventSource|import\(", script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser", script)
    assert "The MIT License (MIT)" in script, "the licence of the charts goes with every copy"


def test_hostile_texts_are_nowhere_in_the_markup(tmp_path):
    folder = write_run(tmp_path / HOSTILE.replace("/", "")[:60], text=HOSTILE, note="<img src=x onerror=1>")
    page = report.write_report([folder]).read_text(encoding="utf-8")
    assert "<script>window" not in page and "<img" not in page and "&lt;img src=x" in page
    block = decoded(page)["rollouts"][0]
    assert HOSTILE in block["rows"]["text"][0] and HOSTILE in block["groups"]["history"][0][0][1]


def test_the_words_of_a_plumbing_run_are_in_title_and_data(tmp_path):
    page = report.write_report([write_run(tmp_path / "run")]).read_text(encoding="utf-8")
    assert re.search(f"<title>[^<]*{NOTE}</title>", page)
    assert decoded(page)["summary"][0]["runs"][0]["note"] == NOTE


def test_several_runs_and_studies_share_a_page(tmp_path, capsys):
    folders = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    (tmp_path / "clusters.json").write_text(json.dumps([{"cluster": "x", "n": 1, "mean": 0.5}]))
    assert report.main([*map(str, folders), "--study", str(tmp_path / "clusters.json")]) == 0
    assert f"{tmp_path / 'report.html'}:" in capsys.readouterr().out
    data = decoded((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [run["label"] for run in data["summary"][0]["runs"]] == ["a", "b"]
    assert data["summary"][0]["comparisons"][0]["difference"] == 0.0
    assert data["summary"][0]["studies"][0]["kind"] == "clusters"
    assert [block["run"] for block in data["rollouts"]] == [0, 1]


@pytest.mark.parametrize("missing", ["folder", "study"])
def test_what_is_missing_is_an_error_in_words(tmp_path, capsys, missing):
    run = tmp_path / "none" if missing == "folder" else write_run(tmp_path / "run")
    study = [] if missing == "folder" else ["--study", str(tmp_path / "none.json")]
    assert report.main([str(run), *study]) == 2
    assert ("no metrics.jsonl" if missing == "folder" else "does not exist") in capsys.readouterr().err


def test_numbers_that_json_does_not_have_do_not_reach_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "rollouts" / "step_000002.jsonl"
    path.write_text(path.read_text().replace('"r2": 0.25', '"r2": NaN').replace('"R": 0.5', '"R": Infinity'))
    page = report.write_report([folder]).read_text(encoding="utf-8")
    rows = decoded(page)["rollouts"][0]["rows"]
    assert rows["r2"][0] is None and rows["R"][0] is None and rows["r1"][0] == 1.0

"""The page: styles, scripts and compressed data in one file that asks the network for nothing.

Texts of a run reach the page only as compressed data and are shown as text, never as markup; beyond that a
content security policy allows the page's own scripts by their digests and nothing else.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment

SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "elements.js",
    "charts.js",
    "tables.js",
    "changes.js",
    "rollouts.js",
    "dialogues.js",
    "page.js",
)
LICENCE = "vendor/uPlot.LICENSE.txt"
"""Asked for with every copy of the charts' code, and so with every report."""
STYLES = ("vendor/uPlot.min.css", "style.css")


def pieces(title: str, blocks: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """The page piece by piece. ``blocks`` are (kind, content); the page decodes the summary first wherever it
    stands, and the others in their order."""
    style = "\n".join(map(_asset, STYLES))
    script = "\n".join((f"/*\n{_asset(LICENCE)}*/", *map(_asset, SCRIPTS)))
    assert "</script" not in script.lower() and "</style" not in style.lower(), (
        "an asset ends its own element"
    )
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = Environment(autoescape=True, keep_trailing_newline=True).from_string(_asset("page.html"))
    text = page.render(title=title, policy=policy, style="@style@", script="@script@", data="@data@")
    before, rest = text.split("@style@")
    middle, rest = rest.split("@data@")
    until_script, end = rest.split("@script@")
    yield from (before, style, middle)
    for kind, content in blocks:
        yield block(kind, content)
    yield from (until_script, script, end)


def block(kind: str, content: Any) -> str:
    """A data element that no parser reads as anything but text: gzip in base64."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=5, mtime=0))
    return f'<script type="application/gzip" class="data" data-kind="{kind}">{packed.decode()}</script>\n'


def _asset(name: str) -> str:
    return files("selfemo_jax.reporting").joinpath("assets", name).read_text(encoding="utf-8")

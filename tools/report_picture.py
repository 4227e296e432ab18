"""Take the picture of a run's report for the README; needs Debian's chromium and the package playwright.

python tools/report_picture.py RUN docs/report.png
"""

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from selfemo_jax.report import write_report

MOST_BYTES = 200_000


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report anew, open it and save what a visitor sees first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args(argv)
    from PIL import Image
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        print("error: no chromium was found; install Debian's package chromium", file=sys.stderr)
        return 2
    report = write_report([args.run]).resolve()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1120})
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        page.wait_for_timeout(1000)
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        taken = page.screenshot()
        browser.close()
    # A page has few colours, and a palette makes the file a third as large.
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(192).save(args.picture, optimize=True)
    size = args.picture.stat().st_size
    print(f"{args.picture}: {size / 1000:.0f} kB")
    return 0 if size <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())

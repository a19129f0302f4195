"""Take the pictures of the page that stand in docs/: the shipped adapter, the bundled handbook, a real headless Chromium.

`python docs/screenshots.py` needs Debian's `chromium` and `pip install playwright`; about a minute on two cores.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from icae.demo import QUESTIONS, SAMPLE

DOCS = Path(__file__).parent
PATIENCE = 600_000
"""Milliseconds that a step may take."""
DESK, PHONE = {"width": 960, "height": 800}, {"width": 390, "height": 844}
PICTURES = {
    "page-light.png": {"color_scheme": "light", "viewport": DESK},
    "page-dark.png": {"color_scheme": "dark", "viewport": DESK},
    "page-phone.png": {"color_scheme": "light", "viewport": PHONE, "is_mobile": True, "has_touch": True},
}


def serve(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start `icae serve` with a store in `folder`; return it with its address."""
    log = folder / "log"
    with log.open("w") as file:
        command = [sys.executable, "-c", "from icae.cli import main; main()", "serve", "--port", "0", "--store", str(folder / "store")]
        server = subprocess.Popen(command, stderr=file)
    while not (found := re.search(r"running on (http://\S+)", log.read_text())):
        if server.poll() is not None:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.5)
    return server, found[1]


def use(page: Page) -> None:
    """Do what a visitor does: compress the handbook, point at a slot, ask."""
    page.get_by_label("Paste a text").fill(SAMPLE.read_text(encoding="utf-8").strip())
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("tokens are read back right").wait_for()
    page.get_by_label("Question").fill(QUESTIONS[0])
    page.get_by_role("button", name="Ask both").click()
    page.locator("#from-text dt").first.wait_for()
    page.locator("#grid button").nth(20).click()
    page.get_by_label("Paste a text").evaluate("field => { field.scrollTop = 0; }")
    page.mouse.move(0, 0)


def main() -> None:
    """Take all pictures."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server, url = serve(Path(folder))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            for name, settings in PICTURES.items():
                page = browser.new_context(**settings).new_page()
                page.set_default_timeout(PATIENCE)
                page.goto(url)
                use(page)
                page.screenshot(path=DOCS / name, full_page=True)
                print(f"{name}: {(DOCS / name).stat().st_size // 1000} kB")
                page.context.close()
        finally:
            browser.close()
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()

"""How long a visitor waits: `python demo/opening.py [--times 5]`; from opening the page to the first answer's first word.

The demo runs in a process of its own; headless Chromium opens the page anew each time, with nothing cached. The first figure of
`started` is a visit at once after the start, so it holds the loading of PyTorch and the model; the others find it loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# the first column's answer has begun: an ellipsis stands there while it is awaited
ANSWERED = """() => {
    const box = document.querySelector('#answer0 textarea, #answer0 input');
    return box && box.value && box.value !== '\\u2026' ? [performance.now(), box.value] : false;
}"""


def main() -> None:
    """Measure, print JSON, exit with 1 if the median visit to a loaded model waits for more than 3 s."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--port", type=int, default=7918)
    given = parser.parse_args()
    address, place = f"http://127.0.0.1:{given.port}", tempfile.mkdtemp(prefix="vtprune-opening-")
    command = [sys.executable, str(Path(__file__).parent / "app.py"), "--port", str(given.port)]
    begin = time.monotonic()
    server = subprocess.Popen(command, env={**os.environ, "TMPDIR": place}, stdout=subprocess.DEVNULL)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS, timeout=120_000)
            until_serving(address)
            serving = time.monotonic() - begin
            at_once = visit(browser, address)
            waits = [visit(browser, address) for _ in range(given.times)]
            browser.close()
    finally:
        server.terminate()
        server.wait(60)
        shutil.rmtree(place, ignore_errors=True)
    median = sorted(w["first_answer_s"] for w in waits)[len(waits) // 2]
    print(json.dumps({"serving_after_s": round(serving, 2), "started": at_once, "loaded": waits, "median_s": median}, indent=1))
    sys.exit(int(median > 3))


def visit(browser: Browser, address: str) -> dict[str, float | str]:
    """Seconds from opening until the page stands and until the first word of an answer, and the word."""
    page = browser.new_context(viewport={"width": 1300, "height": 1000}).new_page()
    page.goto(address, timeout=120_000)
    page.locator("#ask").wait_for(timeout=120_000)
    stands = page.evaluate("performance.now()")
    at, word = page.wait_for_function(ANSWERED, timeout=120_000, polling="raf").json_value()
    page.context.close()
    return {"page_s": round(stands / 1000, 2), "first_answer_s": round(at / 1000, 2), "answer": word}


def until_serving(address: str) -> None:
    """Wait for the server to answer."""
    for _ in range(600):
        try:
            httpx.get(address, timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(address)


if __name__ == "__main__":
    main()

"""Reports in headless Chromium: what it says of them, and what a few lines of script saw there."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
NEEDED = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
WATCH = """<script>
const told = { errors: [] };
onerror = (message) => { told.errors.push(message); };
onunhandledrejection = (event) => { told.errors.push(String(event.reason)); };
onload = async () => {
  const wait = () => new Promise((done) => setTimeout(done, 300));
  await wait();
  %s
  const page = document.documentElement;
  told.width = page.clientWidth;
  told.back = getComputedStyle(document.body).backgroundColor;
  told.fetched = performance.getEntriesByType("resource").map((x) => x.name);
  const cut = (x) => x.scrollWidth > x.clientWidth;
  told.cut = [...document.querySelectorAll("figure:not(.wide), dl, p, li")].filter(cut).length;
  told.overflow = page.scrollWidth - page.clientWidth;
  parent.document.title = JSON.stringify(told);
};
</script>"""
FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"><title></title>
</head><body><iframe style="border: 0; width: {width}px; height: 850px" srcdoc="{page}"></iframe>
</body></html>"""


def look(page: Path, folder: Path, actions: str = "", width: int = 390, dark=False) -> dict:
    """Open a copy of a page in `folder`, and fail on any error or if something is fetched.

    actions: JavaScript that fills `told`; it may await wait(). width: of the window in pixels (390:
    a phone's); neither the page nor a picture that is not wide must be wider. dark: whether the
    browser asks for a dark page.
    Returns what was told.
    """
    text, copy = page.read_text(encoding="utf-8"), folder / f"{page.stem}_watched.html"
    watched = html.escape(text.replace("<h1>", f"{WATCH % actions}<h1>", 1))
    frame = FRAME.format(width=width, page=watched)  # as a window is never so narrow
    copy.write_text(frame, encoding="utf-8")
    # the browser does not tell of a file that is absent
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(""", text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width + 150},900"]
    command += [f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr, done.stderr
    told = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert told["errors"] == [] and told["fetched"] == [], told
    assert told["overflow"] <= 0 and told["cut"] == 0, told
    return told

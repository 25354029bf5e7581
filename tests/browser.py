"""Reports in headless Chromium: what it says of them, and what a few lines of script saw there."""

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
  told.fetched = performance.getEntriesByType("resource").map((x) => x.name);
  told.overflow = document.documentElement.scrollWidth - innerWidth;
  document.title = JSON.stringify(told);
};
</script>"""


def look(page: Path, folder: Path, actions: str = "", width: int = 500) -> dict:
    """Open a copy of a page in `folder`, and fail on any error or if something is fetched.

    actions: JavaScript that fills `told`; it may await wait(). width: of the window in pixels; the
    page must not be wider.
    Returns what was told.
    """
    text, copy = page.read_text(encoding="utf-8"), folder / f"{page.stem}_watched.html"
    copy.write_text(text.replace("<h1>", f"{WATCH % actions}<h1>", 1), encoding="utf-8")
    # the browser does not tell of a file that is absent
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(""", text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    command += ["--virtual-time-budget=10000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    told = json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert told["errors"] == [] and told["fetched"] == [] and told["overflow"] <= 0, told
    return told

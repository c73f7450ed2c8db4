"""The site in a real browser: it fits a phone, fetches nothing from elsewhere, and its search finds."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",  # stays open until it is closed
    "--window-size=1400,900",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
Seen = dict[str, Any]
# Opens the pages in frames of a phone's width, then searches in one, and posts what it saw.
PROBE = """<!doctype html><meta charset="utf-8"><body><script>
const seen = {pages: {}, fetched: [], found: []};
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
async function open(page) {
  const frame = document.createElement("iframe");
  frame.style = "border: 0; width: 390px; height: 844px";
  frame.src = page;
  const loaded = new Promise((done) => { frame.onload = done; });
  document.body.append(frame);
  await loaded;
  await frame.contentDocument.fonts.ready;
  await sleep(300);
  return frame.contentWindow;
}
function measure(view) {
  const root = view.document.documentElement;
  const wide = [...view.document.querySelectorAll("article *")].filter((one) =>
    !one.closest("pre, .md-typeset__scrollwrap, svg, [hidden]")
    && one.getBoundingClientRect().right > view.innerWidth + 1);
  return {width: view.innerWidth, scroll: root.scrollWidth, text: view.document.body.innerText.length,
          tables: view.document.querySelectorAll("article table").length,
          wrapped: view.document.querySelectorAll("article .md-typeset__scrollwrap table").length,
          wide: wide.map((one) => one.tagName + "." + one.className + " " + one.textContent.slice(0, 40))};
}
(async () => {
  await Promise.all(PAGES.map(async (page) => {
    const view = await open(page);
    seen.pages[page] = measure(view);
    seen.fetched.push(...view.performance.getEntriesByType("resource").map((one) => one.name));
  }));
  const view = await open("index.html");
  view.document.querySelector("#__search").click();
  const query = view.document.querySelector("input[name=query]");
  query.focus();
  query.value = "LatentCache";
  query.dispatchEvent(new view.Event("keyup", {bubbles: true}));
  for (let tries = 0; tries < 100 && !seen.found.length; tries++) {
    await sleep(100);
    seen.found = [...view.document.querySelectorAll(".md-search-result__link")].map((one) => one.href);
  }
  await fetch("/seen", {method: "POST", body: JSON.stringify(seen)});
})();
</script></body>"""


class Host(ThreadingHTTPServer):
    """A folder on this host, and what a page of it posts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"
        self.posted: queue.Queue[bytes] = queue.Queue()


class _Handler(SimpleHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Host)
        self.server.posted.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Serve a copy of the site, with the probe beside its pages."""
    folder = tmp_path_factory.mktemp("served") / "site"
    shutil.copytree(site, folder)
    pages = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.html"))]
    (folder / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    with Host(folder) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        yield host
        host.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def seen(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return what the probe saw; a browser may be missing, but not in CI."""
    program = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on PATH, and CHROME names none")
    folder = tmp_path_factory.mktemp("browser")
    command = [str(program), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"{host.address}probe.html"]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as browser:
        try:
            return dict(json.loads(host.posted.get(timeout=120)))
        except queue.Empty:
            pytest.fail((folder / "log").read_text(errors="replace")[-3000:])
        finally:
            browser.terminate()


def test_nothing_scrolls_sideways_on_a_phone(seen: Seen) -> None:
    pages = seen["pages"]
    assert len(pages) > 20
    for page, found in pages.items():
        assert found["text"] > 200, page
        assert found["tables"] == found["wrapped"], page
        assert (found["scroll"], found["wide"]) == (found["width"], []), page
    assert sum(found["tables"] for found in pages.values()) > 10


def test_nothing_is_loaded_from_elsewhere(seen: Seen, host: Host) -> None:
    fetched = seen["fetched"]
    assert len(fetched) > 5
    assert [url for url in fetched if not url.startswith(host.address)] == []


def test_the_search_finds_a_name_of_the_reference(seen: Seen) -> None:
    assert any("docs/api/core.html" in url for url in seen["found"]), seen["found"]

"""The site in a real browser: it fits a phone, fetches nothing from elsewhere, and its search finds."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import chromium
import pytest

NOTHING_ELSE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
Seen = dict[str, Any]
# Opens the pages in frames of a phone's width, then searches in one, and returns what it saw.
PROBE = """(async (PAGES) => {
const seen = {pages: {}, fetched: [], results: []};
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
  for (let tries = 0; tries < 600 && !seen.results.length; tries++) {
    await sleep(100);
    seen.results = [...view.document.querySelectorAll(".md-search-result__link")].map((link) => link.href);
  }
  return seen;
})"""
# Turns to the dark theme by the site's own switch, and returns the pictures that can be seen then.
DARK = """(async () => {
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  const body = document.body;
  for (let tries = 0; tries < 50 && body.dataset.mdColorScheme !== "slate"; tries++) {
    const labels = [...document.querySelectorAll("form[data-md-component=palette] label")];
    labels.find((one) => !one.hidden)?.click();
    await sleep(100);
  }
  return [...document.querySelectorAll("article img")].filter((one) => one.checkVisibility())
    .map((one) => new URL(one.src).pathname.split("/").pop());
})()"""


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host(site: Path) -> Iterator[str]:
    """Serve the site on this host and return its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """Start Chromium once, which reaches this host alone; it may be missing, but not in CI."""
    program = chromium.program()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on PATH, and CHROME names none")
    started = chromium.Chromium(str(program), tmp_path_factory.mktemp("profile"), NOTHING_ELSE)
    started.media("light")
    started.width(1400)
    yield started
    started.close()


@pytest.fixture(scope="module")
def seen(browser: chromium.Chromium, host: str, site: Path) -> Seen:
    """Return what the probe saw of all pages."""
    browser.open(f"{host}404.html")
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    return dict(browser.run(f"{PROBE}({json.dumps(pages)})"))


def test_nothing_scrolls_sideways_on_a_phone(seen: Seen) -> None:
    pages = seen["pages"]
    assert len(pages) > 20
    for page, facts in pages.items():
        assert facts["text"] > 200, page
        assert facts["tables"] == facts["wrapped"], page
        assert (facts["scroll"], facts["wide"]) == (facts["width"], []), page
    assert sum(facts["tables"] for facts in pages.values()) > 10


def test_nothing_is_loaded_from_elsewhere(seen: Seen, host: str) -> None:
    fetched = seen["fetched"]
    assert len(fetched) > 5
    assert [url for url in fetched if not url.startswith(host)] == []


def test_the_search_finds_a_name_of_the_reference(seen: Seen) -> None:
    assert any("docs/api/core.html" in url for url in seen["results"]), seen["results"]


def test_pictures_follow_the_theme_that_a_reader_has_chosen(browser: chromium.Chromium, host: str) -> None:
    browser.open(f"{host}docs/gallery.html")
    shown = browser.run(DARK)
    assert len(shown) > 3
    assert all(name.endswith("-dark.svg") for name in shown)

"""What the site's hooks make of links, and that the check of the built site finds what it is for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import markdown
import pytest

FORGE = {
    "GITHUB_SERVER_URL": "https://forge.example",
    "GITHUB_REPOSITORY": "someone/some",
    "GITHUB_SHA": "0123456789ab",
}


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the hook of links, on a machine of no forge."""
    import links

    for name in FORGE:
        monkeypatch.delenv(name, raising=False)
    return links


def html(links: ModuleType, tmp_path: Path, text: str) -> str:
    """Render a page docs/page.md of a repository with a source file, a folder and a folder with a page."""
    for path in ("docs/page.md", "code/one.py", "pages/README.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    extension = links.SourceLinks(tmp_path)
    extension.page, extension.files = "docs/page.md", {"docs/page.md", "pages/README.md"}
    return markdown.markdown(text, extensions=[extension])


def test_links_to_source_are_text_where_no_forge_is_known(links: ModuleType, tmp_path: Path) -> None:
    text = html(links, tmp_path, "[one](../code/one.py) and [`two`](../code/)")
    assert "<a" not in text
    assert '<code title="code/one.py">one</code>' in text
    assert '<span title="code"><code>two</code></span>' in text


def test_links_to_source_lead_to_the_commit_on_the_forge(
    links: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in FORGE.items():
        monkeypatch.setenv(name, value)
    text = html(links, tmp_path, "[one](../code/one.py#L3) and [two](../code/)")
    assert 'href="https://forge.example/someone/some/blob/0123456789ab/code/one.py#L3"' in text
    assert 'href="https://forge.example/someone/some/tree/0123456789ab/code"' in text


@pytest.mark.parametrize(
    ("link", "href"),
    [
        ("../pages/", "../pages/README.md"),  # a folder is its page
        ("../pages#there", "../pages/README.md#there"),
        ("../pages/README.md", "../pages/README.md"),
        ("#here", "#here"),
        ("https://a.example/code/one.py", "https://a.example/code/one.py"),
        ("../code/two.py", "../code/two.py"),  # not there: MkDocs refuses it
        ("../../code/one.py", "../../code/one.py"),  # outside
    ],
)
def test_other_links_are_left_to_mkdocs(links: ModuleType, tmp_path: Path, link: str, href: str) -> None:
    assert f'href="{href}"' in html(links, tmp_path, f"[one]({link})")


def test_a_new_page_goes_to_the_longest_pattern() -> None:
    from pages import expanded

    nav = [
        {"Start": "README.md"},
        {"Guides": ["docs/one.md", "docs/*.md"]},
        {"API": ["docs/api/*.md"]},
        "*.md",
    ]
    pages = ["NEWS.md", "README.md", "docs/api/core.md", "docs/one.md", "docs/two.md", "docs/three.md"]
    assert expanded(nav, pages) == [
        {"Start": "README.md"},
        {"Guides": ["docs/one.md", "docs/two.md", "docs/three.md"]},
        {"API": ["docs/api/core.md"]},
        "NEWS.md",
    ]


def test_the_navigation_ends_with_the_repository_where_one_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from pages import on_config

    def nav() -> list[object]:
        config = SimpleNamespace(nav=[{"Home": "README.md"}], markdown_extensions=[], copyright="")
        on_config(config)
        return list(config.nav)

    for name in FORGE:
        monkeypatch.delenv(name, raising=False)
    assert nav() == [{"Home": "README.md"}]
    for name, value in FORGE.items():
        monkeypatch.setenv(name, value)
    assert nav() == [{"Home": "README.md"}, {"Repository": "https://forge.example/someone/some"}]


def test_names_of_the_reference_stand_one_level_below_their_heading() -> None:
    from pages import with_options

    page = "## Ops\n\n::: a.B\n::: mla.bench.results.C\n### D\n::: a.e\n"
    assert "".join(with_options(page)) == (
        "## Ops\n\n::: a.B\n    options: { heading_level: 3 }\n\n::: mla.bench.results.C\n"
        "    options: { heading_level: 3, show_if_no_docstring: true, show_bases: false }\n\n"
        "### D\n::: a.e\n    options: { heading_level: 4 }\n\n"
    )

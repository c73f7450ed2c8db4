"""The report as a file: complete, escaped, nothing to load, the same bytes for the same runs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
import pytest

from mla.bench import results
from mla.bench.report import figures, page, summary
from mla.bench.results.schema import NewLengths

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FEW_SECTIONS = ["summary", "results", "scenarios", "roofline", "numbers", "method"]
SECTIONS = [*FEW_SECTIONS[:2], "grid", *FEW_SECTIONS[2:4], "stages", *FEW_SECTIONS[4:]]
# Elements a report is made of. None of them runs or loads anything.
OF_PAGE = (
    "a article b body caption code dd details div dl dt figcaption figure footer h1 h2 h3 h4 head header "
    "html img li main meta nav p pre section span style summary table tbody td th thead title tr ul"
)
ELEMENTS = {*OF_PAGE.split()}
DRAWING = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """A parsed report: elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self, tag: str = "") -> list[str]:
        """Return the ids of all elements, or of those of one kind."""
        return [str(given["id"]) for name, given in self.elements if "id" in given and tag in ("", name)]

    def charts(self, kind: str = "wide light") -> dict[str, str]:
        """Return the drawings of one kind by their alternative texts."""
        images = [given for tag, given in self.elements if tag == "img" and given["class"] == kind]
        return {
            str(image["alt"]): base64.b64decode(str(image["src"])[len(DRAWING) :]).decode()
            for image in images
        }


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawings, which take most of the time, where only words are looked at."""
    monkeypatch.setattr(page, "svg", lambda *_: "<svg/>")


def render(*runs: results.Run) -> str:
    return page.render([f"{place}.json" for place in range(len(runs))], runs)


def drawn(runs: Sequence[results.Run], title: str) -> tuple[str, str]:
    """Return the caption of one chart, and the chart."""
    files = summary.result_files([f"{place}.json" for place in range(len(runs))], runs)
    (chart,) = [
        candidate
        for section in page.sections(files)
        for candidate in section.charts
        if candidate.title == title
    ]
    return chart.finding, figures.svg(chart, "light", figures.WIDE_INCHES)


def test_a_rich_report_has_every_section_and_chart(rich_page: str) -> None:
    parsed = Page(rich_page)
    assert parsed.ids("section") == SECTIONS
    assert len(parsed.ids()) == len(set(parsed.ids()))
    titles = [alt.partition(".")[0] for alt in parsed.charts()]
    assert titles == [
        "Latency: sweep, by history",
        "Latency: sweep, by batch",
        "Latency: prefill",
        "Latency: decode",
        "Roofline A",
        "Roofline B",
    ]
    for kind in ("wide dark", "narrow light", "narrow dark"):
        assert list(parsed.charts(kind)) == list(parsed.charts())
    assert len(rich_page) < 1.5e6


def test_captions_are_the_alternative_texts_and_say_what_can_be_seen(rich_page: str) -> None:
    captions = [html.unescape(match) for match in re.findall(r"<figcaption>(.*?)</figcaption>", rich_page)]
    texts = list(Page(rich_page).charts())
    assert len(captions) == len(texts)
    for caption, text in zip(captions, texts, strict=True):
        assert text.endswith(caption)
        assert re.search(r"\d", caption)
    said = " ".join(captions)
    assert re.search(r"A mla is [\d.]+x as fast as mla-reference \([^)]*\), at \d+ % of the", said)
    assert re.search(r"prefill, mla, at \d+ % of the (compute|memory) limit", said)
    assert re.search(r"A mla, batch 1: [\d.]+ ms at 256 to [\d.]+ ms at 65536", said)


@pytest.mark.usefixtures("undrawn")
def test_every_number_of_a_case_is_in_a_table(rich: Sequence[results.Run]) -> None:
    case = rich[0].cases[0]
    case.new_lengths = NewLengths(forwards=7, ms=23.5, repeated_ms=2.35, plan_ms=20.5, repeated_plan_ms=0.25)
    assert case.latency_ms is not None
    text = render(rich[0])
    numbers = text[text.index('<section id="numbers">') :]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", numbers)]
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["scenario"], first["implementation"]) == ("prefill", "mla")
    for name, value in (
        ("latency p90 ms", case.latency_ms.p90),
        ("needed flop", case.cost.flops),
        ("unseen lengths ms", 23.5),
        ("graph ms", case.timings[1].latency_ms.median),  # type: ignore[union-attr]
    ):
        assert float(first[name]) == pytest.approx(value, rel=5e-3)
    assert "unseen lengths: 23.5 ms a forward (planning 20.5), seen: 2.35 (0.25)" in Page(text).text
    for stage in case.stages:
        assert f">{stage.name}</th>" in text


def test_a_wrong_case_is_red_and_has_its_reason_but_no_number(rich_page: str) -> None:
    row, reason = re.findall(r'<tr class="[^"]*wrong">.*?</tr>', rich_page)[:2]
    assert "long-prefill" in row
    assert row.count("<td>-</td>") == 9
    assert "row 17 is off by 31 times its bound" in reason
    assert "1 of 11 cases wrong" in rich_page
    assert not any("long-prefill" in svg for svg in Page(rich_page).charts().values())


def test_a_case_without_a_number_stands_beside_those_that_have_one(rich: Sequence[results.Run]) -> None:
    wrong, doubt = [case for case in rich[0].cases if case.scenario == "decode"]
    wrong.latency_ms = wrong.tokens_per_s = None
    wrong.check = results.Check(status="wrong", reason="off")
    doubt.roofline = results.Roofline(bound="memory", floor_ms=0.2, doubt="faster than its floor")
    text, svg = drawn(rich[:1], "Latency: decode")
    assert "mla has no number: wrong." in text
    assert "✗ wrong: no number" in svg
    assert " ?</text>" in svg
    assert "<pattern" in svg


def test_limits_are_marks_with_a_name(rich: Sequence[results.Run]) -> None:
    text, svg = drawn(rich[:1], "Latency: prefill")
    assert "The limit is 0.109 ms." in text
    assert ">limit 0.109 ms<" in svg
    text, svg = drawn(rich, "Latency: prefill")  # of files whose limits differ
    assert "(limit 0.109)" in text
    assert "(limit 0.142)" in text
    assert ">limit of the device<" in svg


def test_it_names_devices_verdicts_and_commands(rich_page: str) -> None:
    text = Page(rich_page).text
    for expected in (
        "Card One 80GB",
        "0123456789ab-dirty",
        "no graph of this op can be captured",
        "launch bound",
        "SLOWER",
        "warning: device differs: Card One 80GB and Card Two",
        "drift +0.4 %",
        "python -m mla.bench --scenario 'decode' --implementations mla-reference",
        "sm clock 1755 MHz, power 650 W",
    ):
        assert expected in text, expected


def test_nothing_is_loaded_and_nothing_runs(rich_page: str) -> None:
    assert_harmless(rich_page)
    assert not re.search(r"https?:|@import|<script", rich_page)


def assert_harmless(text: str) -> None:
    """Check that a page holds only known elements, links into itself, and no handler of an event."""
    for tag, given in Page(text).elements:
        assert tag in ELEMENTS
        assert not [name for name in given if name.startswith("on") or name in ("srcset", "xlink:href")]
        assert (given.get("href") or "#").startswith("#")
        assert (given.get("src") or DRAWING).startswith(DRAWING)


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \"'{{ 7 * 7 }} $x$ 漢字 </svg></style>"


def test_text_from_files_is_escaped(rich: Sequence[results.Run]) -> None:
    for run in rich:
        run.backend.device = run.git_commit = run.argv[0] = HOSTILE
        run.config = {"name": HOSTILE, HOSTILE: HOSTILE}
        run.environment = {HOSTILE: HOSTILE}
        for case in run.cases:
            case.scenario += HOSTILE
            case.base += HOSTILE
            case.implementation = f"_{case.implementation}{HOSTILE}"
            case.check.reason = case.repro = HOSTILE
            for stage in case.stages:
                stage.name += HOSTILE
            for timing in case.timings:
                timing.clock = timing.check.reason = HOSTILE
        for ceiling in run.ceilings:
            ceiling.source = ceiling.dtype = HOSTILE
    text = page.render([HOSTILE, HOSTILE], rich)
    assert_harmless(text)
    assert HOSTILE not in text
    assert html.escape("<script>alert(1)</script>") in text
    assert HOSTILE in Page(text).text
    for svg in Page(text).charts().values():
        assert "<script" not in svg


def test_the_same_runs_give_the_same_bytes(process: Any, rich: Sequence[results.Run], tmp_path: Path) -> None:
    rich[0].cases = rich[0].cases[:2]
    results.write(rich[0], tmp_path / "run.json")
    for seed in ("1", "2"):
        done = process("report", "run.json", "--html", f"{seed}.html", PYTHONHASHSEED=seed, MPLBACKEND="svg")
        assert done.code == 0, done.err
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_settings_of_matplotlib_do_not_show(rich: Sequence[results.Run]) -> None:
    plain = drawn(rich, "Latency: decode")
    with matplotlib.rc_context({"xtick.direction": "in", "svg.fonttype": "path", "font.size": 20}):
        assert drawn(rich, "Latency: decode") == plain
        assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.usefixtures("undrawn")
def test_files_of_both_schemas_mix(rich: Sequence[results.Run]) -> None:
    old = {path.name: run for path in COMMITTED if (run := results.read(path)).schema_version == 1}
    assert old
    parsed = Page(page.render([*old, "new.json"], [*old.values(), rich[0]]))
    assert set(parsed.ids("section")) == set(SECTIONS)
    assert re.search(r"none of \d+ cases can be compared: config differs", parsed.text)
    assert "Comparison: E new.json" not in parsed.text, "a table without rows"
    assert "This file has no limits" in parsed.text


@pytest.mark.parametrize("cases", [0, 1])
def test_a_run_with_little_in_it_is_a_page(make_run: Any, cases: int) -> None:
    run = make_run((5.0,))
    run.cases = run.cases[:cases]
    parsed = Page(render(run))
    assert parsed.ids("section") == (FEW_SECTIONS if cases else ["summary", "results", "method"])


@pytest.mark.usefixtures("undrawn")
def test_passes_have_a_column_where_one_case_ran_fewer(make_run: Any) -> None:
    counts = results.Planned(passes=10, steps=100, due=6)
    less = render(make_run([1.8] * 12, steps_per_pass=2, planned=counts))
    assert '<th scope="col">passes</th>' in less
    assert "<td>6 x 2</td>" in less
    assert "6 passes of 2 (planned were 10 of 100) after 1 warm-ups" in less
    assert '<th scope="col">passes</th>' not in render(make_run()).partition('<section id="numbers">')[0]


@pytest.mark.usefixtures("undrawn")
def test_many_cases_leave_room_and_say_so(make_run: Any, case: Any) -> None:
    run = make_run()
    run.cases = [case(scenario=f"s{i}", base="grid", point={"heads": i}) for i in range(60)]
    assert "The first 24 of 60 are drawn." in Page(render(run)).text
    run.cases = [
        case(scenario=f"s{kv} {batch}", base="sweep", point={"kv": kv, "batch": batch}, roofline=near)
        for kv in range(16, 66, 2)
        for batch in (1, 8)
        for near in [results.Roofline(fraction=kv / 100, bound="memory", floor_ms=1.0)]
    ]
    text = render(run)
    assert "sweep (50 points): only mla has numbers; at 16 % to 64 % of the limit" in first_screen(text)
    assert "5 of 25 such charts are drawn." in text
    assert len([name for name in Page(text).ids("figure") if name.startswith("grid")]) == 1 + 5


def first_screen(text: str) -> str:
    """Return what is read before the links to the sections, with single spaces."""
    return " ".join(Page(text[: text.index("<nav")]).text.split())


@pytest.mark.usefixtures("undrawn")
def test_the_first_screen_says_by_how_much_and_how_near_the_limit_and_how_noisy(
    rich: Sequence[results.Run],
) -> None:
    text = page.render(["/srv/x/one.json", "/srv/x/two.json"], rich)
    screen = first_screen(text)
    slower = r">decode</th><td[^>]*>mla</td>.*<td>1\.\d+</td><td>1\.\d+ \.\. 1\.\d+</td><td[^>]*>SLOWER</td>"
    assert re.search(slower, text[: text.index("<nav")])
    sentence = r"mla is 2\.99x as fast as mla-reference \([\d. ]+\), at \d+ % of the memory limit"
    assert re.search(rf"decode: mla 2\.99x {sentence} \d+ tok/s outliers", screen)
    assert "sweep (6 points): only mla has numbers; at" in screen
    assert "/srv" not in screen


@pytest.mark.usefixtures("undrawn")
def test_a_doubtful_case_has_its_word_its_colour_and_its_reason_and_nothing_is_green(make_run: Any) -> None:
    why = "the clock covers 10 % of the time the pass took"
    run = make_run(check=results.Check(status="doubtful", reason=why), latency_ms=None, tokens_per_s=None)
    text = render(run)
    assert 'class="badge doubtful">1 of 1 case doubtful: no number<' in text
    assert "badge ok" not in text
    assert '<article class="file doubtful">' in text
    row, reason = re.findall(r'<tr class="[^"]*doubtful">.*?</tr>', text)
    assert row.count("<td>-</td>") == 9
    assert "<td>doubtful</td>" in row
    assert why in reason
    assert Page(text).charts() == {}


@pytest.mark.usefixtures("undrawn")
def test_a_time_above_the_limit_shows_a_doubt_and_no_percentage(rich: Sequence[results.Run]) -> None:
    for case in rich[0].cases:
        case.roofline = results.Roofline(floor_ms=9.0, bound="memory", doubt="faster than its floor of 9 ms")
    text = render(rich[0])
    assert "badge ok" not in text
    screen = first_screen(text)
    assert "10 of 11 cases with a suspect limit or time" in screen
    assert re.search(r"as fast as mla-reference \([^)]*\), but its limit or its time is suspect", screen)
    (roofline,) = [alt for alt in Page(text).charts() if alt.startswith("Roofline")]
    assert "its time is suspect" in roofline
    assert "%" not in roofline


@pytest.mark.usefixtures("undrawn")
def test_an_unreliable_headline_is_no_number_and_no_share(make_run: Any) -> None:
    """The share would be that of a number that nobody knows; the table keeps both."""
    near = results.Roofline(floor_ms=34.5, fraction=0.5, bound="memory", peak_source="x")
    for samples, told, changes in (
        ([1.0, 69.0, 69.0, 69.0, 69.0, 276.0], "unreliable (1 .. 276 ms)", {}),
        (
            [69.0],
            "69 ms (1 of 10 passes, no interval)",
            {"planned": results.Planned(passes=10, steps=1, due=1)},
        ),
    ):
        rendered = render(make_run(samples, roofline=near, **changes))
        tiles = rendered.partition('<ul class="tiles">')[2].partition("</ul>")[0]
        assert f"<b>{told}</b>" in tiles
        assert '<li class="unsteady">' in tiles
        assert "50 %" not in tiles
        assert "<td>50 mem</td>" in rendered


@pytest.mark.usefixtures("undrawn")
def test_cases_over_ranks_have_their_scaling_and_every_rank(make_run: Any) -> None:
    runs = [make_run([ms] * 6) for ms in (8.0, 5.0)]
    facts = results.schema.RankFacts(
        rank=0, samples=[5.0], collective_ms=0.3, collective_bytes=4096, cache_bytes=1 << 20, weight_bytes=1
    )
    ranks = [facts, msgspec.structs.replace(facts, rank=1, samples=[6.0])]
    runs[1].cases[0].spread = results.schema.Spread(layout="tp=2", library="gloo", ranks=ranks)
    text = render(*runs)
    assert "B ranks of prefill, mla: tp=2 over gloo" in Page(text).text
    assert "prefill, mla: 1.60x on 2 times" in first_screen(text)

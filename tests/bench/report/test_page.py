"""The report as a file: complete, escaped, nothing to load, the same bytes for the same runs."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.report import page
from mla.bench.report.draw import theme
from mla.bench.report.draw.style import COLOURS
from mla.bench.results.schema import NewLengths
from mla.bench.terminal.digits import number

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
LITTLE = ["summary", "results", "scenarios", "roofline", "samples", "method"]
SECTIONS = [*LITTLE[:2], "grid", *LITTLE[2:4], "stages", "timings", "comparison", *LITTLE[4:]]
# Elements a report is made of. None of them runs or loads anything.
OF_PAGE = (
    "a article b body caption code dd details div dl dt figcaption figure footer h1 h2 h3 h4 head header "
    "html li main meta nav p pre section span style summary table tbody td th thead title tr ul"
)
OF_PICTURES = "clippath defs desc g path pattern rect svg text title tspan use"
ELEMENTS = {*OF_PAGE.split(), *OF_PICTURES.split()}
LOADING = ("src", "srcset", "xlink:href")


# Cases whose number is taken away, or put in doubt.
BESIDE = {("decode", "mla"), ("decode", "mla-reference")}


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


def render(*runs: results.Run) -> str:
    return page.render([f"{place}.json" for place in range(len(runs))], runs)


def test_a_rich_report_has_every_section_and_picture(rich_page: str) -> None:
    found = Page(rich_page)
    assert found.ids("section") == SECTIONS
    figures = found.ids("figure")
    for kind, count in {
        "grid": 2,  # against history, against batch
        "bars": 2,  # prefill, decode
        "roofline": 2,  # one a card
        "stages": 2,
        "timings": 2,
        "compare": 1,
        "samples": 16,  # 8 scenarios with numbers, on both cards
    }.items():
        assert len([one for one in figures if one.startswith(kind)]) == count, kind
    for figure in rich_page.split("<figure ")[1:]:
        body = figure.partition("</figure>")[0]
        assert body.count("<svg viewBox=") == (2 if body.startswith(('id="grid', 'id="bars')) else 1)
        assert "<td" in body.partition("<summary>data<")[2]
    assert len(rich_page) < 1.5e6


def test_pictures_are_named_and_ids_unique(rich_page: str) -> None:
    found = Page(rich_page)
    identities = found.ids()
    assert len(identities) == len(set(identities))
    drawings = [given for tag, given in found.elements if tag == "svg" and given.get("role") == "img"]
    names = {identity for given in drawings for identity in str(given["aria-labelledby"]).split()}
    assert names == {*found.ids("title"), *found.ids("desc")}
    assert all((given.get("href") or "#")[1:] in {"", *identities} for _, given in found.elements)


def test_a_wrong_case_is_red_and_has_its_reason_but_no_number(rich_page: str) -> None:
    row, reason = re.findall(r'<tr class="[^"]*wrong">.*?</tr>', rich_page)[:2]
    assert "long-prefill" in row
    assert row.count("<td>-</td>") == 8
    assert "row 17 is off by 31 times its bound" in reason
    assert "1 of 11 cases wrong" in rich_page
    assert not any("long-prefill" in one for one in re.findall(r"<svg viewBox.*?</svg>", rich_page))


def test_a_case_without_a_number_stands_beside_those_that_have_one(rich: Sequence[results.Run]) -> None:
    wrong, doubt = [one for one in rich[0].cases if (one.scenario, one.implementation) in BESIDE]
    wrong.latency_ms = wrong.tokens_per_s = None
    wrong.check = results.Check(status="wrong", reason="off")
    doubt.roofline = results.Roofline(bound="memory", floor_ms=9.0, doubt="faster than its floor")
    text = render(rich[0])
    bars = re.findall(
        r"<svg viewBox.*?</svg>", text[text.index('id="scenarios"') : text.index('id="roofline"')]
    )
    assert [Page(one).text.count("✗ wrong: no number") for one in bars] == [0, 0, 1, 1]
    assert "mla has no number: wrong" in Page(bars[2]).text
    assert Page(bars[2]).text.count(" ?") == 1
    assert "<pattern" in bars[2]


def test_limits_are_lines_with_their_names(rich: Sequence[results.Run]) -> None:
    drawn = re.findall(r"<svg viewBox.*?</svg>", render(rich[0]))
    floors = {one.scenario: one.roofline.floor_ms for one in rich[0].cases}
    for scenario in ("prefill", "decode"):
        (bars,) = [one for one in drawn if f">Latency: {scenario}<" in one]
        assert f"limit {number(floors[scenario])} ms" in Page(bars).text
    both = page.render(["a.json", "b.json"], rich)  # whose limits differ
    assert "the limit of the device" in Page(both).text


def test_charts_name_no_colour_of_their_own(rich_page: str) -> None:
    for drawn in re.findall(r"<svg .*?</svg>", rich_page, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{3,8}\b|rgb|black|white", drawn.replace('href="#', ""))
        assert set(re.findall(r"var\(--([\w-]+)\)", drawn)) <= set(theme.THEME)


def test_it_names_devices_ways_of_timing_verdicts_and_commands(rich_page: str) -> None:
    text = Page(rich_page).text
    for expected in (
        "Card One 80GB",
        "0123456789ab-dirty",
        "graph, warm, device events",
        "no graph of this op can be captured",
        "Launch bound",
        "SLOWER",
        "Warning: device differs: Card One 80GB and Card Two.",
        "limit 9000 GB/s (32 MiB)",
        "drift +0.4 %",
        "python -m mla.bench --scenario 'decode' --implementations mla-reference",
        "sm clock 1755 MHz",
    ):
        assert expected in text, expected


def test_nothing_is_loaded_and_nothing_runs(rich_page: str) -> None:
    assert_harmless(rich_page)
    assert not re.search(r"https?:|//|@import|<script", rich_page.replace("</", "<"))


def assert_harmless(text: str) -> None:
    """Check that a page holds only known elements, links into itself, and no handler of an event."""
    for tag, given in Page(text).elements:
        assert tag in ELEMENTS
        assert not [
            name for name in given if name.startswith("on") or name in ("src", "srcset", "xlink:href")
        ]
        assert (given.get("href") or "#").startswith("#")
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


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


def test_the_same_runs_give_the_same_bytes(process: Any, files: list[str], tmp_path: Path) -> None:
    for seed in ("1", "2"):
        done = process("report", files[0], "--html", f"{seed}.html", PYTHONHASHSEED=seed, MPLBACKEND="svg")
        assert done.code == 0, done.err
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_settings_of_matplotlib_do_not_show(rich: Sequence[results.Run]) -> None:
    import matplotlib

    plain = render(rich[0])
    with matplotlib.rc_context({"xtick.direction": "in", "svg.fonttype": "path", "font.size": 20}):
        assert render(rich[0]) == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_files_of_both_schemas_mix(rich: Sequence[results.Run]) -> None:
    old = {path.name: run for path in COMMITTED if (run := results.read(path)).schema_version == 1}
    assert old
    found = Page(page.render([*old, "new.json"], [*old.values(), rich[0]]))
    assert set(found.ids("section")) == set(SECTIONS)
    assert "Nothing can be compared" in found.text
    assert "This file has no limits" in found.text


@pytest.mark.parametrize("cases", [0, 1])
def test_a_run_with_little_in_it_is_a_page(make_run: Any, cases: int) -> None:
    run = make_run((5.0,))
    run.cases = run.cases[:cases]
    found = Page(render(run))
    assert found.ids("section") == (LITTLE if cases else ["summary", "results", "method"])


def test_passes_have_a_column_where_one_case_ran_fewer(make_run: Any) -> None:
    counts = results.Planned(passes=10, steps=100, due=6)
    less = render(make_run([1.8] * 12, steps_per_pass=2, planned=counts))
    assert '<th scope="col">passes</th>' in less
    assert "<td>6 x 2</td>" in less
    assert "6 passes of 2 (planned were 10 of 100) after 1 warm-ups" in less
    assert '<th scope="col">passes</th>' not in render(make_run())


def test_long_runs_are_thinned_and_say_so(make_run: Any) -> None:
    samples = [1.0 + 1e-4 * (i % 997) for i in range(6 * 1200)]
    run = make_run(samples, steps_per_pass=1200, passes=6)
    text = render(run)
    assert "Of up to 7200 samples, at most 1200 are drawn" in text
    assert len(text) < 150_000


def test_many_cases_leave_room(make_run: Any, case: Any) -> None:
    run = make_run()
    run.cases = [case(scenario=f"s{i}", base="grid", point={"heads": i}) for i in range(60)]
    found = Page(render(run))
    assert "The first 40 of 60 are drawn" in found.text
    assert len([one for one in found.ids("figure") if one.startswith("samples")]) == 24


def test_parts_of_a_stage_are_listed_and_not_stacked_on_it(rich: Sequence[results.Run]) -> None:
    text = page.render(["a.json", "b.json"], rich)
    section = text[text.index('id="stages"') : text.index('id="timings"')]
    drawn, listed = section.split("<details", 1)
    assert "attention: w_uk" in listed
    assert "attention: w_uk" not in drawn
    assert "attention" in drawn


def first_screen(text: str) -> str:
    """Return what is read before the links to the sections."""
    return Page(text[: text.index("<nav")]).text


def test_the_first_screen_says_who_won_by_how_much_and_how_near_the_limit(
    rich: Sequence[results.Run],
) -> None:
    found = " ".join(first_screen(page.render(["/srv/x/one.json", "/srv/x/two.json"], rich)).split())
    assert re.search(r"decode, mla: A one\.json won, 1\.\d+x as fast as B two\.json \(1\.\d+", found)
    assert re.search(r"decode: mla won, [\d.]+x as fast as mla-reference \([^)]*\), at \d+ % of", found)
    assert "sweep (6 points): only mla has numbers; at" in found
    assert "1 of 11 cases wrong" in found
    assert "long-prefill, mla: wrong: row 17 is off by 31 times its bound" in found
    assert "/srv/x" not in found


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
    assert f"prefill, mla: doubtful: {why}" in first_screen(text)
    assert not re.search(r"<svg viewBox", text)


def test_a_doubtful_case_shows_no_other_timing_either(rich: Sequence[results.Run]) -> None:
    rich[0].cases = rich[0].cases[:1]
    (one,) = rich[0].cases
    one.check, one.latency_ms = results.Check(status="doubtful", reason="because"), None
    one.timings[0].latency_ms = results.Latency(median=77.7, ci95=None, p10=1, p90=99, samples=[77.7])
    assert "77.7" not in Page(render(rich[0])).text


def test_a_time_above_the_limit_shows_a_doubt_and_no_percentage(rich: Sequence[results.Run]) -> None:
    for case in rich[0].cases:
        case.roofline = results.Roofline(floor_ms=9.0, bound="memory", doubt="faster than its floor of 9 ms")
    text = render(rich[0])
    assert "badge ok" not in text
    screen = first_screen(text)
    assert "10 of 11 cases with limit or time in doubt" in screen
    assert "mla is ahead" in screen
    assert "mla won" not in screen
    drawn = re.findall(r"<svg viewBox.*?</svg>", text[text.index('id="roofline"') :])[0]
    assert "in doubt" in drawn
    assert "%" not in Page(drawn).text


def test_limits_show_their_spread_and_new_lengths_their_gap(rich: Sequence[results.Run]) -> None:
    rich[0].ceilings[0].lowest, rich[0].ceilings[0].ours = 1e12, True
    rich[0].cases[0].new_lengths = NewLengths(
        forwards=7, ms=23.5, repeated_ms=2.35, plan_ms=20.5, repeated_plan_ms=0.25
    )
    latency = rich[0].cases[0].latency_ms
    assert latency is not None
    latency.p10 = latency.p90 = latency.median  # no noise hides the gap
    text = Page(render(rich[0])).text
    assert "The limit of reading was measured as 1000 to 3000 GB/s; the highest counts." in text
    assert "nothing outside judges it" in text
    for cell in ("23.5", "2.35", "20.5", "0.25", "1 of 11 cases slower on new lengths"):
        assert cell in text


def test_one_implementation_has_one_colour_in_all_files_and_panels(rich: Sequence[results.Run]) -> None:
    rich[1].cases.reverse()
    text = page.render(["a.json", "b.json"], rich)
    found = re.findall(r"var\(--(s\d)\)[^>]*/></svg> (mla|mla-reference)</li>", text)
    assert len(found) > 3
    assert set(found) == {(COLOURS[0], "mla"), (COLOURS[1], "mla-reference")}


def test_a_page_names_files_and_configs_without_their_folders(rich: Sequence[results.Run]) -> None:
    rich[0].config["name"] = "/home/somebody/configs/tiny.json"
    text = page.render(["/srv/old/run.json", "/srv/new/run.json"], rich)
    assert "/srv" not in text
    assert "/home/somebody" not in text
    assert {"old/run.json", "new/run.json"} <= set(re.findall(r"(\w+/run\.json)</h2>", text))
    assert "tiny, bfloat16" in text


def test_a_sweep_of_many_points_stays_readable(make_run: Any, case: Any) -> None:
    run = make_run()
    run.cases = [
        case(scenario=f"s{kv} {batch}", base="sweep", point={"kv": kv, "batch": batch}, roofline=one)
        for kv in range(16, 66, 2)
        for batch in (1, 8)
        for one in [results.Roofline(fraction=kv / 100, bound="memory", floor_ms=1.0)]
    ]
    text = render(run)
    assert "sweep (50 points): only mla has numbers; at 16 % to 64 % of the limit" in first_screen(text)
    assert len([one for one in Page(text).ids("figure") if one.startswith("grid")]) == 7
    assert "6 of 25 such charts are drawn" in text
    assert len(text) < 800_000


def test_an_unreliable_headline_is_no_number_and_no_share(make_run: Any) -> None:
    """The share would be that of a number that nobody knows; the table keeps both."""
    near = results.Roofline(floor_ms=34.5, fraction=0.5, bound="memory", peak_source="x")
    found = render(make_run([1.0, 69.0, 69.0, 69.0, 69.0, 276.0], roofline=near))
    tiles = found.partition('<ul class="headlines">')[2].partition("</ul>")[0]
    assert "<b>unreliable (1 .. 276 ms)</b>" in tiles
    assert 'class="doubtful"' in tiles
    assert "50 %" not in tiles
    assert "<td>50 mem</td>" in found


def test_a_headline_of_passes_that_were_cut_has_no_share_either(make_run: Any) -> None:
    near = results.Roofline(floor_ms=34.5, fraction=0.5, bound="memory", peak_source="x")
    found = render(make_run([69.0], roofline=near, planned=results.Planned(passes=10, steps=1, due=1)))
    tiles = found.partition('<ul class="headlines">')[2].partition("</ul>")[0]
    assert "<b>69 ms (1 of 10 passes, no interval)</b>" in tiles
    assert 'class="doubtful"' in tiles
    assert "50 %" not in tiles

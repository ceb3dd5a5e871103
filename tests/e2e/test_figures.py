"""Every figure of the pages has a source: a file of results, a test, or the code that sets it.

A paragraph, list item or table with figures names the file they come from, in a link, in backticks or in a comment
(`<!-- figures: benchmarks/results/x.md -->`); a comment above a block counts for that block. Each figure must be found
there, as it stands or rounded. Tables of measurements are no part of the pages: commands write them to
benchmarks/results, where a page is its own source.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("benchmarks/results/*.md"))
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]
_UNITS = "%|×|times|ms|s|seconds|minutes|hours|CPU-seconds|kB|MB|GB|MiB|GiB|TFLOP|nats"
_PLAIN = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e[-−+]?\d+)?"
_FIGURE = re.compile(rf"(?<![\w.@→-])(?<!Python )(?<!Python ≥ )({_PLAIN})(?![\w@]|\.\d)(?:\s?(%|×)|\s(?:{_UNITS})\b)?")
_SCALES = {"%": 100, "GB": 1e-3, "MB": 1e-6}
"""Of the same number in a source: shares, megabytes, bytes."""
_NUMBER = re.compile(r"(?<![\w.])\d[\d,_]*(?:\.\d+)?(?:e[-+]?\d+)?|(?<![\w.])\.\d+")
_SOURCE = re.compile(r"figures:\s*(.*?)\s*-->", re.DOTALL)
_MADE = re.compile(r"(?:written|made)\s+by\s+`([^`]+)`", re.IGNORECASE)


@dataclass(frozen=True)
class Passage:
    """A paragraph, list item, heading or table, with what it names."""

    line: int
    text: str
    named: tuple[str, ...]
    table: bool = False


def passages(page: str) -> Iterator[Passage]:
    """All that somebody wrote by hand."""
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text("utf-8"))
    above: tuple[str, ...] = ()
    table: list[Token] | None = None
    for token in tokens:
        if token.type == "html_block":
            above += sources(token.content)
        elif token.type == "table_open":
            table = []
        elif token.type == "table_close" and table is not None:
            yield passage(page, table, above)
            table, above = None, ()
        elif token.type == "inline" and table is not None:
            table.append(token)
        elif token.type in ("inline", "fence"):
            if token.type == "inline":
                yield passage(page, [token], above)
            above = ()


def passage(page: str, inlines: list[Token], above: tuple[str, ...]) -> Passage:
    children = [child for inline in inlines for child in inline.children or ()]
    text = " ".join(
        "".join(
            " " if c.type == "softbreak" else c.content for c in i.children or () if c.type in ("text", "softbreak")
        )
        for i in inlines
    )
    links = [str(child.attrs["href"]).split("#")[0] for child in children if child.type == "link_open"]
    named = [str((ROOT / page).parent.joinpath(link).resolve()) for link in links if link and "://" not in link]
    named += [str(ROOT / child.content) for child in children if child.type == "code_inline"]
    named += [path for child in children if child.type == "html_inline" for path in sources(child.content)]
    files = tuple(name for name in (*above, *named) if len(name) < 300 and is_source(name))
    return Passage((inlines[0].map or [0])[0] + 1, text, files, table=len(inlines) > 1)


def is_source(name: str) -> bool:
    """Whether a file can say where a number comes from: another page written by hand cannot."""
    path = Path(name)
    if path.suffix == ".md":
        return path.is_file() and (path.parent == ROOT / "benchmarks/results" or written_whole(name))
    return path.suffix in {".py", ".js"} and path.is_file()


def sources(comment: str) -> tuple[str, ...]:
    return tuple(str(ROOT / name) for found in _SOURCE.findall(comment) for name in found.split())


def figures(text: str) -> list[str]:
    """Numbers that somebody measured or chose: with a unit, a decimal point, an exponent or thousands."""
    found = [(match[1].replace("−", "-"), match[0][len(match[1]) :].strip()) for match in _FIGURE.finditer(text)]
    return [number + (unit if unit in _SCALES else "") for number, unit in found if unit or not number.isdigit()]


@cache
def numbers(path: str) -> frozenset[float]:
    found = Path(path).read_text("utf-8").replace("−", "-")
    return frozenset(float(re.sub("[,_]", "", number)) for number in _NUMBER.findall(found))


def found(figure: str, values: frozenset[float]) -> bool:
    """Whether the figure is one of the values, rounded, or one of them in another unit."""
    number = figure.rstrip("%GMB")
    plain, unit = number.replace(",", ""), figure[len(number) :]
    wanted = float(plain)
    mantissa, _, power = plain.partition("e")
    scales = (1, _SCALES.get(unit, 1))
    step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2])) / 2
    return any(abs(wanted - value * scale) <= step * 1.001 for value in values for scale in scales)


def commands_of(page: str) -> list[str]:
    return _MADE.findall((ROOT / page).read_text("utf-8"))


def written_whole(page: str) -> bool:
    """Whether a command writes the whole page, as its first lines say."""
    return bool(_MADE.search((ROOT / page).read_text("utf-8")[:400]))


@pytest.mark.parametrize("page", [page for page in PAGES if not written_whole(page)])
def test_every_figure_has_a_source(page):
    without, wrong = [], []
    for one in passages(page):
        known = frozenset().union(*map(numbers, one.named))
        if missing := [figure for figure in figures(one.text) if not found(figure, known)]:
            (wrong if one.named else without).append(f"{page}:{one.line}: {', '.join(missing)} in “{one.text[:70]}…”")
    assert not without, "these name no source; link to a file of results, or `<!-- figures: PATH -->`:\n" + "\n".join(
        without
    )
    assert not wrong, "these are not in the files that their passages name:\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in (*PAGES, *RESULTS) if commands_of(page)])
def test_what_is_written_by_a_command_names_one_that_exists(page):
    for command in commands_of(page):
        program, *arguments = command.split()
        if program == "circuitsae":
            assert (ROOT / "circuitsae/commands" / f"{arguments[0]}.py").is_file(), command
        elif program == "python" and arguments[0] == "-m":
            assert (ROOT / (arguments[1].replace(".", "/") + ".py")).is_file(), command
        else:
            assert (ROOT / (arguments[0] if program == "python" else program)).is_file(), command


@pytest.mark.parametrize("page", [page for page in PAGES if not written_whole(page)])
def test_tables_of_measurements_are_results_and_no_part_of_a_page(page):
    assert [one.line for one in passages(page) if one.table and len(figures(one.text)) > 3] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.3 CPU-seconds and 0.21 GB", ["3.3", "0.21GB"]),
        ("99% of 3,648 features, 30 % more", ["99%", "3,648", "30%"]),
        ("below 1e-9 relative, 12 layers, 2.713@5 of GPT-2", ["1e-9"]),
        ("circuit-tracer 0.5.0 takes 4 s on Python ≥ 3.11, as in the 1900s", ["4"]),
    ],
)
def test_figures_are_told_from_other_numbers(text, expected):
    assert figures(text) == expected


def test_a_figure_is_found_rounded_and_as_a_share():
    assert found("3.3", frozenset({3.31}))
    assert not found("3.3", frozenset({3.36}))
    assert found("95%", frozenset({0.95}))
    assert not found("95", frozenset({0.95}))
    assert found("0.21GB", frozenset({205.0}))
    assert found("3,648", frozenset({3648.0}))
    assert found("7.4e-07", frozenset({7.44e-7}))
    assert not found("7.4e-07", frozenset({7.6e-7}))

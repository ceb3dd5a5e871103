"""Every command and every Python block of the pages is run, in order, as a reader would who has a clone and no more.

A page's blocks are fenced and name their language: `bash` and `python` are run, page by page, in a copy of the
repository; `text`, `json` and others are shown. What a reader does not see stands in comments:

    <!-- quick: --tokens 20k -->          above a block: these options are added to its circuitsae commands,
    <!-- quick: n=1000 → n=8; 2M → 9k --> or these of its texts are replaced
    <!-- slow: minutes -->                run by `make test-slow` alone
    <!-- skip: downloads a model -->      not run, for this reason
    <!-- output -->                       above a `text` block: what the block before it prints; `…`: left out
    <!-- setup: python … -->              run, and not shown; also `bash`
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from circuitsae.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(p.relative_to(ROOT) for p in ROOT.glob("docs/*.md"))]
SHOWN = {"text", "json", "mermaid"}
_COMMENT = re.compile(r"<!--\s*(quick|slow|skip|output|setup)\b:?\s*(.*?)\s*-->", re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_AGREE, _NOTHING = 0.02, 1e-4


@dataclass(frozen=True)
class Block:
    """A piece of a page that is run or shown."""

    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    def quick(self) -> str:
        """The text with what the page asks to replace."""
        text = self.text
        for change in (
            filter(None, self.marks.get("quick", "").split(";")) if "→" in self.marks.get("quick", "") else ()
        ):
            old, new = (part.strip() for part in change.split("→"))
            assert old in text, f"`quick` replaces {old!r}, which the block does not hold"
            text = text.replace(old, new)
        return text

    def options(self) -> list[str]:
        """The options that are added to each command."""
        quick = self.marks.get("quick", "")
        return [] if "→" in quick else shlex.split(quick)


def blocks_of(text: str) -> Iterator[Block]:
    """The code blocks of a page, and its setups, in order."""
    marks: dict[str, str] = {}
    for token in MarkdownIt("commonmark").parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            for kind, said in _COMMENT.findall(token.content):
                if kind == "setup":
                    language, _, code = said.partition("\n")
                    yield Block(line + 1, language, code)
                else:
                    marks[kind] = said
        elif token.type in ("fence", "code_block"):
            yield Block(line + (token.type == "fence"), token.info.strip(), token.content, marks)
            marks = {}
        elif marks:
            raise AssertionError(f"line {line}: {' and '.join(marks)} marks no code block")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command line."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


class Reader:
    """Somebody who does what a page says, in a folder."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def do(self, block: Block) -> None:
        """Run a block, or compare it with what was printed."""
        if block.language in SHOWN:
            if "output" in block.marks:
                self.compare(block.text)
            return
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                self.run(block)
        finally:
            self.printed = heard.getvalue()
            print(self.printed)

    def run(self, block: Block) -> None:
        match block.language:
            case "python":
                code = "\n" * (block.line - 1) + block.quick()  # so that tracebacks name lines of the page
                exec(compile(code, str(self.page), "exec"), self.names)
            case "bash":
                for words in commands(block.quick()):
                    self.command(words, block.options())
            case other:
                raise AssertionError(f"the block's language is {other!r}; fence it as bash, python or text")

    def command(self, words: list[str], options: list[str]) -> None:
        match words:
            case ["circuitsae", *arguments]:
                assert exit_code([*arguments, *options]) == 0, shlex.join([*words, *options])
            case ["python" | "make" as program, *arguments]:  # of `make`, what it would do
                start = [sys.executable] if program == "python" else ["make", "--dry-run"]
                done = subprocess.run(
                    [*start, *arguments], capture_output=True, text=True, encoding="utf-8",
                    env=os.environ | {"PYTHONPATH": str(self.folder)},
                )  # fmt: skip
                print(done.stdout)
                assert done.returncode == 0, done.stderr
            case _:
                raise AssertionError(f"{shlex.join(words)!r} is no circuitsae, python or make; mark it with `skip`")

    def compare(self, shown: str) -> None:
        """Every line that is shown was printed: the same words, numbers within 2 % or next to nothing."""
        printed = self.printed.splitlines()
        for line in filter(lambda line: line.strip(" …"), shown.splitlines()):
            assert any(same(line, other) for other in printed), f"{line!r} is not among\n{self.printed}"


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def same(shown: str, printed: str) -> bool:
    """Whether the words that are shown were printed in this order, with others between them."""
    words = iter(printed.split())
    return all(any(alike(word, other) for other in words) for word in shown.split())


def alike(shown: str, printed: str) -> bool:
    """Whether two words are the same, up to rounding."""
    if _NUMBER.sub("#", shown) != _NUMBER.sub("#", printed):
        return False
    pairs = zip(*([float(n.replace(",", "")) for n in _NUMBER.findall(word)] for word in (shown, printed)), strict=True)
    return all(abs(a - b) <= _AGREE * abs(a) or max(abs(a), abs(b)) < _NOTHING for a, b in pairs)


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """What git keeps of the repository, and what is about to be; nothing lies beside it."""
    folder = tmp_path_factory.mktemp("clone") / "circuitsae"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")):
        source = ROOT / os.fsdecode(name)
        if source.is_file():
            (folder / os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / os.fsdecode(name))
    return folder


def cases() -> Iterator[Any]:
    for page in PAGES:
        yield pytest.param(page, False, id=str(page))
        if any("slow" in block.marks for block in blocks_of((ROOT / page).read_text("utf-8"))):
            yield pytest.param(page, True, id=f"{page}-slow", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.pages
@pytest.mark.parametrize(("page", "slow"), list(cases()))
def test_what_a_page_says_works(page, slow, clone, tmp_path, monkeypatch, subtests):
    folder = shutil.copytree(clone, tmp_path / "circuitsae")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reader = Reader(page, folder)
    for block in blocks_of((folder / page).read_text("utf-8")):
        with subtests.test(f"{page}:{block.line}"):
            if "skip" in block.marks:
                pytest.skip(block.marks["skip"])
            if "slow" in block.marks and not slow:
                pytest.skip(f"slow ({block.marks['slow']}): run by `make test-slow`")
            reader.do(block)


def test_blocks_are_found_with_their_marks():
    page = "a\n\n<!-- quick: 2M → 9k -->\n```bash\nx 2M\n```\n\n<!-- setup: python\ny = 1\n-->\n\n    indented\n"
    quick, setup, indented = blocks_of(page)
    assert (quick.line, quick.language, quick.quick(), quick.options()) == (5, "bash", "x 9k\n", [])
    assert (setup.language, setup.text) == ("python", "y = 1")
    assert indented.language == ""
    with pytest.raises(AssertionError, match="fence it"):
        Reader(Path("page"), Path()).do(indented)
    with pytest.raises(AssertionError, match="does not hold"):
        Block(1, "bash", "x", {"quick": "2M → 9k"}).quick()
    with pytest.raises(AssertionError, match="marks no code block"):
        list(blocks_of("<!-- skip: why -->\n\ntext\n"))


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("·Mary 0.9702", "│ ·Mary │ 0.9711 │ +16.64 │", True),
        ("·Mary 0.9702", "·Mary 0.93", False),
        ("·Mary 0.9702", "·John 0.9702", False),
        ("difference 3.5e-07", "difference 9e-08", True),
        ("difference 3.5e-07", "difference 0.1", False),
    ],
)
def test_lines_are_the_same_up_to_rounding(shown, printed, expected):
    assert same(shown, printed) is expected

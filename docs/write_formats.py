"""Writes the tables of docs/dictionaries.md from what the contract tests cover: `python docs/write_formats.py`."""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGE = DOCS / "dictionaries.md"
GOLDEN = ROOT / "tests" / "golden" / "dictionaries"
_BEGIN, _END = "<!-- written by docs/write_formats.py -->", "<!-- end -->"


def table() -> str:
    """Two tables: what each format is recognised by, and what is tested of each layout."""
    from tests.contracts.formats.covered import COVERED
    from transcoders.formats.registry import FORMATS

    names = ["| format | whose | recognised by |", "|---|---|---|"]
    names += [f"| `{form.name}` | {form.community} | {form.marker} |" for form in FORMATS.values()]
    rows = [
        "| format | layout | reads | writes | attributes | checked against the package itself |",
        "|---|---|---|---|---|---|",
    ]
    for row in COVERED:
        tests = ["–" if test is None else "yes" for test in (row.reads, row.writes, row.attributes)]
        rows.append(f"| `{row.format}` | {row.layout} | {' | '.join(tests)} | {_peer(row.peer)} |")
    return "\n".join([*names, "", *rows])


def page() -> str:
    """The page with its tables written anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{table()}\n\n{_END}{after}"


def golden(pattern: str) -> list[Path]:
    """The folders that a package wrote, by a pattern in which {a,b} stands for either."""
    found = re.search(r"\{([^}]*)\}", pattern)
    each = [pattern] if found is None else [pattern.replace(found[0], one) for one in found[1].split(",")]
    return sorted({path for one in each for path in GOLDEN.glob(one) if (path / "truth.json").is_file()})


def _peer(pattern: str | None) -> str:
    if pattern is None:
        return ""
    folders = golden(pattern)
    told = [json.loads((folder / "truth.json").read_text(encoding="utf-8")) for folder in folders]
    packages = sorted({f"{said['peer']} {said['version']}" for said in told})
    return f"{', '.join(packages)}: {len(folders)} set{'s' * (len(folders) != 1)}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} written\n")

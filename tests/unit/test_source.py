"""What is true of the source itself: names, imports, and what the packages declare."""

import ast
import symtable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("circuitsae", "transcoders", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def test_no_comprehension_takes_a_name_of_its_module():
    """CPython 3.12.1 then takes the module's name for a local one in the whole function, and fails where it is used."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for name, line in shadowed(path.read_text("utf-8"))
    ]
    assert found == []


def test_shadowing_is_found():
    assert shadowed("def f(): ...\nplaces = {n: f for f, n in enumerate('ab')}\n") == [("f", 2)]


def shadowed(source: str) -> list[tuple[str, int]]:
    """The variables of comprehensions that are also names of the module, with their lines."""
    symbols = symtable.symtable(source, "module", "exec").get_symbols()
    own = {
        symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }
    targets = [node.target for node in ast.walk(ast.parse(source)) if isinstance(node, ast.comprehension)]
    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [(name.id, name.lineno) for name in names if name.id in own]

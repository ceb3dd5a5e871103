"""What is true of the source itself: names, imports, and what the packages declare."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("circuitsae", "transcoders", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


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
    tree = ast.parse(source)
    own = set(names_of(tree))
    targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.comprehension)]
    names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [(name.id, name.lineno) for name in names if name.id in own]


def names_of(node: ast.AST) -> Iterator[str]:
    """What a module's own statements define, assign and import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.alias):
            yield (child.asname or child.name).partition(".")[0]
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, _SCOPES):
            yield from names_of(child)

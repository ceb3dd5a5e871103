"""What an installed package has: its version, its types, its page, and a page for its command line."""

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import circuitsae
import transcoders
from circuitsae.cli import main
from transcoders.plotly_bundle import BUNDLE_FILE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `python -m build` makes, where its backend is installed: no network is asked."""
    for module in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(module, reason=f"needs {module}: pip install '.[tests]'")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(folder / built.stdout.split()[-1]) as archive:
        yield archive


def test_the_wheel_holds_both_packages_with_their_types_and_the_pocket_model(wheel):
    names = set(wheel.namelist())
    wanted = {f"{package}/{name}" for package in ("circuitsae", "transcoders") for name in ("__init__.py", "py.typed")}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "circuitsae/pocket").rglob("*.safetensors")}
    assert files
    assert wanted | files <= names
    assert f"transcoders/vendor/{BUNDLE_FILE}" in names
    assert any(name.endswith("licenses/transcoders/vendor/LICENSE-plotly.js") for name in names)
    assert not {name for name in names if name.split("/")[0] in {"tests", "benchmarks", "docs"}}


def test_the_package_page_links_to_addresses_only(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    page = wheel.read(name).decode()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf-8"))) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "Project-URL: Repository, https://" in page


@pytest.mark.parametrize("package", [circuitsae, transcoders])
def test_version_is_that_of_the_distribution(package):
    assert package.__version__ == version("circuitsae")


def test_the_command_line_says_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"circuitsae {version('circuitsae')}\n"


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {version('circuitsae')}\n" in citation


def test_no_advice_asks_for_a_clone():
    """Who installed a wheel has no Makefile and no folder to install from."""
    found = []
    for path in (path for package in ("circuitsae", "transcoders") for path in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.BinOp | ast.IfExp | ast.Dict)]
        texts = [text.value for node in raised for text in ast.walk(node) if isinstance(text, ast.Constant)]
        found += [
            f"{path.name}: {t}" for t in texts if isinstance(t, str) and re.search(r"`make |install -e|\[dev\]", t)
        ]
    assert found == []


@pytest.mark.skipif(
    f"\ntyro=={version('tyro')}\n" not in (ROOT / "constraints.txt").read_text("utf-8"),
    reason="the page is that of the tyro that constraints.txt names; others word a usage otherwise",
)
def test_the_page_of_the_command_line_is_what_the_commands_print():
    spec = importlib.util.spec_from_file_location("write_cli", ROOT / "docs/write_cli.py")
    assert spec is not None
    assert spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert written.PAGE.read_text("utf-8") == written.page(), "run `python docs/write_cli.py`"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(tmp_path, shell):
    with pytest.raises(SystemExit) as done:
        main(["--tyro-write-completion", shell, str(tmp_path / "completion")])
    text = (tmp_path / "completion").read_text("utf-8")
    assert done.value.code in (None, 0)
    assert "trace" in text
    assert "max-features" in text

"""The pages as a site: what the reference names exists, results have a page, and the map of CONTRIBUTING is right."""

import importlib
import importlib.util
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import circuitsae

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^::: (\S+)(?:\n    options: \{members: \[([^\]]*)\]\})?$", re.MULTILINE)


def reference() -> list[str]:
    """The full name of everything that the reference says it shows."""
    text = (ROOT / "docs/reference.md").read_text("utf-8")
    blocks = _BLOCK.findall(text)
    assert len(blocks) == len(re.findall("^:::", text, re.MULTILINE))
    return [f"{block}.{name}" if name else block for block, names in blocks for name in names.split(", ")]


def public(name: str) -> bool:
    """Whether there is a module of this name, or one that gives it to its users."""
    home, _, last = name.rpartition(".")
    try:
        if home and last in (module := importlib.import_module(home)).__dict__.get("__all__", dir(module)):
            return True
        return find_spec(name) is not None
    except ImportError:
        return False


def test_the_reference_names_what_exists():
    assert [name for name in reference() if not public(name)] == []


def test_the_reference_has_every_name_of_the_top():
    assert set(circuitsae.__all__) <= {name.rpartition(".")[2] for name in reference()}


def test_every_page_and_every_result_is_in_the_navigation():
    configured = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = [page for group in yaml.safe_load(configured)["nav"] for pages in group.values() for page in pages]
    pages = [path for page in listed for path in page.values()]
    written = {f"results/{path.name}" for path in ROOT.glob("benchmarks/results/*.md")}
    assert sorted(pages) == sorted({path.name for path in ROOT.glob("docs/*.md")} | written)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_path_in_the_map_exists():
    spans = re.findall(r"`([^`\n ]+)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    named = [span for span in spans if "/" in span or span.endswith((".py", ".toml", ".yml"))]
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def formats():
    return script("write_formats")


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_training_needs_by_size_is_what_its_function_says():
    scaling = script("write_scaling")
    assert scaling.PAGE.read_text("utf-8") == scaling.page(), "run `python docs/write_scaling.py`"


def test_the_table_of_criteria_is_up_to_date():
    audit = script("write_audit")
    assert audit.PAGE.read_text("utf-8") == audit.page(), "run `python docs/write_audit.py`"


def test_the_table_of_formats_is_up_to_date(formats):
    assert formats.PAGE.read_text("utf-8") == formats.page(), "run `python docs/write_formats.py`"


def test_every_format_and_every_file_of_a_package_is_in_the_table(formats):
    from tests.contracts.formats.covered import COVERED
    from transcoders.formats.registry import FORMATS

    assert {row.format for row in COVERED} == set(FORMATS) - {"native"}
    shown = [path for row in COVERED if row.peer for path in formats.golden(row.peer)]
    assert len(shown) == len(set(shown))
    written = {path.parent for path in formats.GOLDEN.glob("*/*/truth.json")}
    refused = (
        "sae_lens/abstopk",  # TopK of absolute values
        "clt_training/cross_layer_affine",  # active features are raised by another number for each target
        "clt_training/cross_layer_skip",  # skip terms from one layer to another
        "crosslayer_transcoder/relu_samplewise",  # standardised by each token's own statistics
    )
    assert set(shown) == written - {formats.GOLDEN / name for name in refused}


def test_the_tests_behind_the_table_exist():
    from tests.contracts.formats.covered import COVERED

    named = {test for row in COVERED for test in (row.reads, row.writes, row.attributes) if test is not None}
    for module, test in sorted(name.split("::") for name in named):
        source = (ROOT / "tests/contracts/formats" / f"{module}.py").read_text("utf-8")
        assert f"def {test}(" in source, f"{module}::{test}"
    for module in {row.attributes.split("::")[0] for row in COVERED if row.attributes}:
        source = (ROOT / "tests/contracts/formats" / f"{module}.py").read_text("utf-8")
        assert any(check in source for check in ("residual()", "assert_attributes(", "assert_derivatives("))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs: pip install '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "reference/index.html").read_text("utf-8")
    assert [name for name in reference() if f'id="{name}"' not in page] == []
    assert (tmp_path / "results/circuits/index.html").is_file()

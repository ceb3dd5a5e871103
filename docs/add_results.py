"""Puts benchmarks/results beside the pages when MkDocs builds them, so that there is one copy of every result."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Each file of results is a page, `results/NAME.md`."""
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of the pages to the repository's folder lead to these pages."""
    return markdown.replace("](../benchmarks/results/", "](results/")

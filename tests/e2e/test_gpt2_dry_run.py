"""`circuitsae reproduce --model gpt2` on a random model of GPT-2 small's exact shape: every stage runs to its end."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT.parent / "shared/data/tokenizers/gpt2"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not TOKENIZER.exists(), reason=f"GPT-2's tokenizer is not at {TOKENIZER}")
def test_the_path_to_the_published_figures_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    script = importlib.import_module("gpt2_dry_run")

    model, dictionaries = script.stand_in(tmp_path, TOKENIZER)
    report = script.dry_run("ioi", model, dictionaries, tmp_path / "ioi")
    published = {claim["name"]: claim for claim in report["claims"] if claim["published"] is not None}
    assert published["logit_diff on clean prompts"]["published"] == 3.56
    assert published["logit_diff on clean prompts"]["verdict"] == "differs"
    assert any(name.startswith("faithfulness of ioi-wang2022") for name in published)
    stages = {"behaviour", "heads and MLPs", "roles of heads", "stability", "published circuits", "features"}
    assert stages <= report["seconds"].keys()
    assert (tmp_path / "ioi" / "ioi.html").exists()

"""The plot of sparsity against fidelity."""

import math
from dataclasses import replace

import pytest
import torch

from transcoders import evaluate, random_dictionaries, random_model
from transcoders.errors import FileFormatError, InputError
from transcoders.evaluation import pareto_front, write_pareto


@pytest.fixture(scope="module")
def evaluation():
    model = random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=20, context=16)
    rows = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    return evaluate(model, random_dictionaries("plt", n_layers=2, d_model=16).requires_grad_(False), rows)


def with_fvu(evaluation, l0, fvu):
    return replace(evaluation, layers=tuple(replace(layer, l0=l0, fvu=fvu) for layer in evaluation.layers))


def test_front_by_hand():
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (4.0, 0.5), (5.0, math.nan)]
    assert pareto_front(points) == [(1, 5.0), (2, 3.0), (4, 0.5)]
    assert pareto_front([]) == []


def test_the_page_holds_every_kind_and_needs_no_network(evaluation, tmp_path):
    file = tmp_path / "evaluation.json"
    with_fvu(evaluation, 4.0, 0.321).save(file)
    page = write_pareto(
        {"TopK": [with_fvu(evaluation, 8.0, 0.123), file], "Gated": [evaluation], "none": []},
        tmp_path / "new" / "p.html",
    )
    text = page.read_text()
    for words in ("TopK", "Gated", "FVU 0.123", "FVU 0.321", "Pareto front", "Loss recovered"):
        assert words in text
    assert "<script src=" not in text, "plotly.js is in the page"
    assert text.index("FVU 0.321") < text.index("FVU 0.123"), "points of a kind are in the order of their L0"


def test_nothing_to_plot_and_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no evaluation to plot"):
        write_pareto({"TopK": []}, tmp_path / "p.html")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"x\.json"):
        write_pareto({"TopK": [tmp_path / "x.json"]}, tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()

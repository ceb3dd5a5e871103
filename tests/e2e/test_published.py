"""README's second example, tracing with somebody's published transcoders, run as it stands.

The repositories that it names lie in the hub client's cache, in the hub's layout, with small random weights in them: a
Llama of two layers behind the pocket model's tokenizer, and transcoders in circuit-tracer's layout. So the very names
of the example are resolved, and no network is needed.
"""

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitsae.cli import main
from circuitsae.graph import load_graph
from circuitsae.pocket import MODEL_DIR
from tests.e2e.test_documented import blocks_of, commands
from tests.hub import cache_repository, use_cache
from transcoders import random_dictionaries, save_dictionaries

README = Path(__file__).resolve().parents[2] / "README.md"
MODEL, DICTIONARIES = "meta-llama/Llama-3.2-1B", "mntss/transcoder-Llama-3.2-1B"


def example() -> dict[str, str]:
    """The blocks of README's second section, by their language."""
    sections = README.read_text("utf-8").split("\n## ")
    assert sections[1].startswith("Start\n")
    assert sections[2].startswith("With dictionaries that somebody published\n")
    return {block.language: block.text for block in blocks_of(sections[2])}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("published")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place / "model")
    for path in MODEL_DIR.glob("*token*"):
        shutil.copy(path, place / "model")
    made = random_dictionaries("plt", n_layers=2, d_model=32, features=48, activation="jumprelu", seed=4)
    save_dictionaries(made.requires_grad_(False), place / "transcoders", format="circuit-tracer")
    cache_repository(place / "cache", MODEL, place / "model")
    cache_repository(place / "cache", DICTIONARIES, place / "transcoders")
    return place / "cache"


@pytest.fixture
def reader(cache, tmp_path, monkeypatch):
    """Somebody in an empty folder who has downloaded both before."""
    use_cache(monkeypatch, cache)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_as_they_stand(reader):
    listed, traced = commands(example()["bash"])
    assert (listed[0], traced[0]) == ("circuitsae", "circuitsae")
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        main(listed[1:])
        main(traced[1:])
    assert re.search(r"llama: circuit-tracer", heard.getvalue())
    (folder,) = (reader / "graphs").iterdir()
    graph = load_graph(folder)
    assert graph.provenance["source"] == {"model": MODEL, "dictionaries": "llama"}
    assert "".join(graph.tokens).endswith("Dallas is")
    assert any(node.kind.value == "feature" for node in graph.nodes)
    assert (folder / "graph.html").is_file()
    assert (folder / "validation.json").is_file()


def test_the_code_runs_as_it_stands(reader):
    names: dict[str, Any] = {}
    exec(compile(example()["python"], "README.md", "exec"), names)
    assert (reader / "dallas.html").stat().st_size > 10_000
    dictionaries = names["model"].dictionaries
    assert (dictionaries.n_layers, dictionaries.n_features(1), str(dictionaries.reads[1])) == (2, 48, "1.mlp_in")
    assert names["graph"].edges_frame().shape[0] > 10

"""Small cases that broke other tools: each goes through trace, attribute, prune, validate and the page.

All of it in double precision, where the rows of a graph must sum up to what the model computed, and an edge must be
what the frozen model does, to rounding.
"""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitsae.attribution import LogitTargets, TopLogits, attribute
from circuitsae.cli import main
from circuitsae.graph import AttributionGraph, NodeKind, prune
from circuitsae.replacement import ReplacementModel
from circuitsae.report import write_html
from circuitsae.validation import validate
from transcoders import load_dictionaries, random_dictionaries, random_model, save_dictionaries
from transcoders.dictionaries import CrossLayerTranscoder, TranscoderSet
from transcoders.errors import InputError, PromptError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

CONTEXT, FEATURES, WORDS = 12, 24, 24
SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 2, "context": CONTEXT, "dtype": torch.float64}
PROMPT = torch.tensor([0, 5, 9, 13, 5, 7])
EXACT = 1e-9


def language_model(family: Any = "gpt2", *, d_vocab=WORDS, seed=0):
    return random_model(family, d_vocab=d_vocab, seed=seed, **SIZES)


def transcoders(kind: Any = "clt", **options):
    return random_dictionaries(kind, d_model=16, features=FEATURES, dtype=torch.float64, **options)


def unembedding(model: LanguageModel) -> torch.Tensor:
    """[token, d_model], to change in place."""
    head: Any = model.bridge.original_model.lm_head
    return head.weight


@pytest.fixture(params=["clt", "plt"])
def dictionaries(request) -> CrossLayerTranscoder | TranscoderSet:
    return transcoders(request.param, activation="jumprelu")


def weights(dictionaries, name) -> list[torch.Tensor]:
    """One matrix or vector per layer, to change in place."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        stacked: Any = dictionaries.activation.threshold if name == "threshold" else getattr(dictionaries, name)
        return [layer.detach() for layer in stacked]
    layers: Any = dictionaries.layers
    return [(d.activation.threshold if name == "threshold" else getattr(d, name)).detach() for d in layers]


def whole_path(model: ReplacementModel, prompt, folder: Path, *, exact=EXACT, **settings) -> AttributionGraph:
    """The full graph of a prompt, after every later step was taken and checked."""
    graph = attribute(model, prompt, **settings)
    size = max(1.0, float(abs(graph.weights).sum(axis=1).max()))
    assert np.isfinite(graph.weights.data).all()
    assert np.abs(graph.residual()).max() < exact * size
    assert sum(node.kind is NodeKind.LOGIT for node in graph.nodes) > 0
    pruned = prune(graph)
    check: Any = validate(model, pruned, edges=8, controls=20)
    assert len(check.edges) > 0 or pruned.weights.nnz == 0
    assert sum(check.verdicts("direct").values()) == len(check.edges)
    for claim in check.claims:
        assert np.isfinite(check.claim(claim)[["predicted", "measured"]]).all(axis=None)
    if "direct" in check.claims:
        np.testing.assert_allclose(
            check.claim("direct")["predicted"], -check.edges["weight"], atol=exact * size, rtol=0
        )
    assert check.logit_error < exact
    annotated = check.annotate(pruned)
    annotated.save(folder)
    check.save(folder / "validation.json")
    assert json.loads((folder / "validation.json").read_text())["logit_error"] == check.logit_error
    page = write_html(annotated, folder / "graph.html", validation=check.edges, plotlyjs="cdn")
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return graph


def active(graph: AttributionGraph) -> set[tuple[int, int, int]]:
    return {(n.layer, n.pos, n.index) for n in graph.nodes if n.kind is NodeKind.FEATURE}


# prompts


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("token", [0, 5])
def test_a_prompt_of_one_token(tmp_path, dictionaries, family, token):
    """Position 0 has no features: the graph is what the token, the MLPs and the biases give to the logits."""
    graph = whole_path(ReplacementModel(language_model(family), dictionaries), torch.tensor([token]), tmp_path)
    assert active(graph) == set()
    assert {n.kind for n in graph.nodes} >= {NodeKind.TOKEN, NodeKind.LOGIT}


def test_a_prompt_as_long_as_the_context_and_one_longer(tmp_path, dictionaries, word_tokenizer):
    model = ReplacementModel(language_model(), dictionaries, bos=True)
    model.model.tokenizer = word_tokenizer()
    text = "".join(f" w{i}" for i in range(CONTEXT - 1))
    assert len(whole_path(model, text, tmp_path).tokens) == CONTEXT
    for longer in (text + " w1", torch.arange(CONTEXT + 1)):
        with pytest.raises(PromptError, match=f"has {CONTEXT + 1} tokens, but .* at most {CONTEXT}"):
            attribute(model, longer)
    without = attribute(model, text + " w1", bos=False)
    assert len(without.tokens) == CONTEXT


@pytest.mark.parametrize("token", [0, 7])
def test_a_prompt_with_the_same_token_everywhere(tmp_path, dictionaries, token):
    whole_path(ReplacementModel(language_model(), dictionaries), torch.full((6,), token), tmp_path)
    rotary = ReplacementModel(language_model("llama"), dictionaries)
    graph = whole_path(rotary, torch.full((6,), token), tmp_path)
    features = active(graph)  # where only attention sees positions, every one computes the same
    assert len(features) > 0
    assert {(layer, i) for layer, pos, i in features if pos == 1} == {(layer, i) for layer, _, i in features}


# tokens and tokenizers


def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path, dictionaries, word_tokenizer):
    """Ids that the tokenizer does not know have logits too, and go by their number."""
    model = ReplacementModel(language_model(d_vocab=40), dictionaries, bos=True)
    model.model.tokenizer = word_tokenizer()
    assert model.model.d_vocab == 40
    graph = whole_path(model, " w1 w2 w3", tmp_path, targets=LogitTargets([2, 39]))
    assert [n.text for n in graph.nodes if n.kind is NodeKind.LOGIT] == [" w0", "#39"]
    every = attribute(model, " w1 w2 w3", targets=TopLogits(probability=1.0, at_most=40))
    texts = [n.text for n in every.nodes if n.kind is NodeKind.LOGIT]
    assert len(set(texts)) == 40
    with pytest.raises(InputError, match="ids from 0 to 39"):
        attribute(model, " w1", targets=LogitTargets([40]))


def test_a_token_never_seen_in_training_can_be_the_target(tmp_path, dictionaries):
    """An id that nothing used keeps the row of the unembedding it was given, be it zero."""
    model = language_model("llama")
    with torch.no_grad():
        unembedding(model)[17] = 0
    graph = whole_path(ReplacementModel(model, dictionaries), PROMPT, tmp_path, targets=LogitTargets([17, 3]))
    logits, _ = model.run(PROMPT[None])
    assert logits[0, -1, 17] == 0
    assert graph.nodes[-2].index == 17
    centred = float(logits[0, -1, 17] - logits[0, -1].mean())
    assert float(graph.nodes[-2].pre_activation) == pytest.approx(centred, abs=EXACT)


def test_bos_of_id_zero(tmp_path, dictionaries, word_tokenizer):
    """0 is a token like any other: it is put first, known as BOS, and can be the target."""
    model = ReplacementModel(language_model(), dictionaries)
    model.model.tokenizer = word_tokenizer(adds_bos=True)
    assert model.model.bos == 0
    graph = whole_path(model, " w1 w2", tmp_path, targets=LogitTargets([0, 1]))
    assert graph.token_ids == (0, 3, 4)
    assert graph.provenance["bos"] is True
    at_bos = {n.kind for n in graph.nodes if n.pos == 0 and n.kind is not NodeKind.TOKEN}
    assert at_bos == {NodeKind.BIAS}
    assert [n.index for n in graph.nodes if n.kind is NodeKind.LOGIT] == [0, 1]


def test_a_tokenizer_without_bos(tmp_path, dictionaries, word_tokenizer):
    model = ReplacementModel(language_model(), dictionaries)
    model.model.tokenizer = word_tokenizer(bos=None)
    graph = whole_path(model, " w1 w2", tmp_path)
    assert graph.token_ids == (3, 4)
    assert graph.provenance["bos"] is False
    assert {n.kind for n in graph.nodes if n.pos == 0 and n.layer >= 0} >= {NodeKind.ERROR}


# dictionaries


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["clt", "plt"])
def test_dictionaries_in_half_precision_on_a_model_in_float32(tmp_path, kind, storage):
    """Their weights are what they were rounded to; all sums are in the model's precision."""
    save_dictionaries(transcoders(kind), tmp_path / "d", storage_dtype=storage)
    model = language_model().to(torch.float32)
    loaded = load_dictionaries(tmp_path / "d", dtype=storage)
    assert loaded.decoder_bias(0).dtype == storage
    graph = whole_path(ReplacementModel(model, loaded), PROMPT, tmp_path, exact=2e-5)
    exact = ReplacementModel(language_model(), load_dictionaries(tmp_path / "d", dtype=storage))
    same = attribute(exact, PROMPT)
    assert active(graph) == active(same)
    np.testing.assert_allclose(graph.weights.toarray(), same.weights.toarray(), atol=1e-4)


def test_decoder_rows_of_zero_norm(tmp_path, dictionaries):
    """A feature that writes nothing is no source of anything, and still a target."""
    plain = attribute(ReplacementModel(language_model(), dictionaries), PROMPT)
    layer, _, index = min(active(plain))
    weights(dictionaries, "W_dec")[layer][index] = 0
    graph = whole_path(ReplacementModel(language_model(), dictionaries), PROMPT, tmp_path)
    rows = [i for i, n in enumerate(graph.nodes) if n.kind is NodeKind.FEATURE and (n.layer, n.index) == (layer, index)]
    assert rows
    assert abs(graph.weights[:, rows]).sum() == 0
    assert abs(graph.weights[rows]).sum() > 0


def test_all_decoders_zero(tmp_path, dictionaries):
    for decoder in weights(dictionaries, "W_dec"):
        decoder[:] = 0
    graph = whole_path(ReplacementModel(language_model(), dictionaries), PROMPT, tmp_path)
    features = np.array([n.kind is NodeKind.FEATURE for n in graph.nodes])
    assert abs(graph.weights[:, features]).sum() == 0


def test_no_feature_active_at_a_position(tmp_path, dictionaries):
    """Encoders without the direction that one position reads, and a bias below their thresholds."""
    model, silent = language_model(), 3
    reads = model.activations(PROMPT[None], [Site(layer, "mlp_in") for layer in range(2)])
    for layer, (W_enc, b_enc) in enumerate(
        zip(weights(dictionaries, "W_enc"), weights(dictionaries, "b_enc"), strict=True)
    ):
        read = reads[Site(layer, "mlp_in")][0, silent]
        W_enc -= torch.outer(read, read @ W_enc) / (read @ read)
        b_enc[:] = -0.1
    graph = whole_path(ReplacementModel(model, dictionaries), PROMPT, tmp_path)
    assert {pos for _, pos, _ in active(graph)} == {1, 2, 4, 5}


def test_no_feature_active_anywhere(tmp_path, dictionaries):
    for b_enc in weights(dictionaries, "b_enc"):
        b_enc[:] = -1e3
    model = ReplacementModel(language_model(), dictionaries)
    assert active(whole_path(model, PROMPT, tmp_path)) == set()
    assert active(attribute(model, PROMPT, max_features=3)) == set()
    assert active(attribute(model, PROMPT, unexplained=0.1)) == set()


def test_a_feature_active_at_every_position(tmp_path, dictionaries):
    weights(dictionaries, "b_enc")[0][7] = 50
    graph = whole_path(ReplacementModel(language_model(), dictionaries), PROMPT, tmp_path)
    assert {pos for layer, pos, i in active(graph) if (layer, i) == (0, 7)} == {1, 2, 3, 4, 5}  # never at 0


def test_every_feature_active_everywhere(tmp_path, dictionaries):
    for b_enc in weights(dictionaries, "b_enc"):
        b_enc[:] = 50
    graph = whole_path(ReplacementModel(language_model(), dictionaries), PROMPT, tmp_path)
    assert len(active(graph)) == 2 * FEATURES * (len(PROMPT) - 1)


def test_two_features_with_identical_decoders(tmp_path, dictionaries):
    """What they write goes by how active each is: their edges are in that ratio, to every target."""
    for name in ("W_enc", "W_dec"):
        weight = weights(dictionaries, name)[0]
        if name == "W_enc":
            weight[:, 4] = weight[:, 3]
        else:
            weight[4] = weight[3]
    b_enc, threshold = weights(dictionaries, "b_enc")[0], weights(dictionaries, "threshold")[0]
    b_enc[3], b_enc[4] = 9.0, 12.0
    threshold[3] = threshold[4] = 0.1
    model = ReplacementModel(language_model(), dictionaries)
    graph = whole_path(model, PROMPT, tmp_path)
    row = {(n.layer, n.pos, n.index): i for i, n in enumerate(graph.nodes) if n.kind is NodeKind.FEATURE}
    a = {tuple(i): float(v) for i, v in zip(*(x.tolist() for x in model.trace(PROMPT).features), strict=True)}
    for pos in range(1, len(PROMPT)):
        one, other = (0, pos, 3), (0, pos, 4)
        expected = graph.weights[:, [row[one]]].toarray() * a[other] / a[one]
        np.testing.assert_allclose(graph.weights[:, [row[other]]].toarray(), expected, atol=EXACT)


# settings


def test_max_features_of_none_and_of_more_than_there_are(tmp_path, dictionaries):
    model = ReplacementModel(language_model(), dictionaries)
    with pytest.raises(InputError, match="max_features=0 leaves nothing to compute; give at least 1"):
        attribute(model, PROMPT, max_features=0)
    full = attribute(model, PROMPT)
    for n in (len(active(full)), len(active(full)) + 1, 10**9):
        graph = attribute(model, PROMPT, max_features=n)
        assert [node.id for node in graph.nodes] == [node.id for node in full.nodes]
        np.testing.assert_allclose(graph.weights.toarray(), full.weights.toarray(), atol=EXACT)
    assert len(active(whole_path(model, PROMPT, tmp_path, max_features=1))) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_that_tie_at_the_top(tmp_path, dictionaries, family):
    """Tokens with one unembedding have one logit and the same edges; among equals the lower id comes first."""
    model = language_model(family)
    top = int(model.run(PROMPT[None])[0][0, -1].argmax())
    twins = sorted({top, *(i for i in range(10, WORDS) if i not in PROMPT)})
    with torch.no_grad():
        unembedding(model)[twins] = unembedding(model)[top].clone()
    logits = model.run(PROMPT[None])[0][0, -1]
    assert len(set(logits[twins].tolist())) == 1
    assert int(logits.argmax()) in twins
    graph = whole_path(ReplacementModel(model, dictionaries), PROMPT, tmp_path, targets=TopLogits(at_most=4))
    rows = [i for i, n in enumerate(graph.nodes) if n.kind is NodeKind.LOGIT]
    assert [graph.nodes[i].index for i in rows] == twins[:4]
    edges = graph.weights[rows].toarray()
    np.testing.assert_allclose(edges, np.broadcast_to(edges[0], edges.shape), atol=EXACT)


def test_logits_that_are_all_equal(tmp_path, dictionaries):
    """With an unembedding of one column over, nothing moves a centred logit."""
    model = language_model("llama")
    with torch.no_grad():
        unembedding(model)[:] = unembedding(model)[0].clone()
    graph = whole_path(ReplacementModel(model, dictionaries), PROMPT, tmp_path)
    rows = [i for i, n in enumerate(graph.nodes) if n.kind is NodeKind.LOGIT]
    assert [graph.nodes[i].index for i in rows] == list(range(10))
    assert abs(graph.weights[rows]).max() < EXACT


# surroundings


@pytest.mark.parametrize("value", ["true", "false", "0", "nonsense"])
def test_tokenizers_parallelism_may_be_set(tmp_path, monkeypatch, capfd, value):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    main(["trace", "The cat", "--max-features", "3", "--validate", "0", "--out", str(tmp_path / "graph")])
    assert (tmp_path / "graph" / "graph.html").is_file()
    assert "huggingface/tokenizers" not in capfd.readouterr().err


def refused(capsys, out: Path) -> str:
    """What `trace` says, to one line of standard error, where it cannot write its result."""
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "The cat", "--max-features", "3", "--validate", "0", "--out", str(out)])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert said.startswith("error:")
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    return said


def test_a_folder_that_cannot_be_written_to(capsys):
    assert "/proc/graphs" in refused(capsys, Path("/proc/graphs"))


@pytest.mark.parametrize("below", ["", "graphs/the-cat"])
def test_a_file_where_the_folder_should_be(tmp_path, capsys, below):
    (tmp_path / "taken").write_text("mine")
    assert "taken" in refused(capsys, tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("room", [0, 100, 4096, 100_000])
def test_a_disk_that_is_full(tmp_path, capsys, room):
    """A limit on the size of files makes the system refuse further bytes as a full disk does, wherever they are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        refused(capsys, tmp_path / "graphs" / "the-cat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []

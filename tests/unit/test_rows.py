"""Rows of tokens and their chunks: gone on with from any place, and documents that do not see one another."""

import json
from itertools import chain, islice
from typing import Any

import pytest
import torch

from transcoders import open_corpus, random_model
from transcoders.data import ActivationStream, sites_of, tokens
from transcoders.data.chunks import Chunks, require_masked
from transcoders.data.tokens import CorpusRows, Row, TokenRows, stacked
from transcoders.errors import FileFormatError, InputError
from transcoders.sites import Site
from transcoders.training import SAEConfig, TranscoderConfig, train
from transcoders.training.batches import ModelSource
from transcoders.training.config_reading import config_from_json
from transcoders.training.trainer import Trainer

DOCUMENTS = ["".join(f" w{(i * j) % 20}" for j in range(1, 2 + (5 * i) % 17)) for i in range(120)]
MODES: list[Any] = ["packed", "masked", "separate"]


@pytest.fixture
def model(word_tokenizer):
    made = random_model(d_model=16, n_heads=2, d_vocab=24, context=16, dtype=torch.float64)
    made.tokenizer = word_tokenizer(adds_bos=True)
    return made


@pytest.fixture(params=["txt", "jsonl", "documents"])
def corpus(request, tmp_path):
    if request.param == "documents":
        return open_corpus(DOCUMENTS)
    path = tmp_path / f"a.{request.param}"
    if request.param == "txt":
        path.write_text("\n\n".join(DOCUMENTS))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return open_corpus(path)


# places


@pytest.mark.parametrize("mode", MODES)
def test_rows_go_on_from_any_place(model, corpus, monkeypatch, mode):
    monkeypatch.setattr(tokens, "_DOCUMENTS_AT_ONCE", 7)
    rows = CorpusRows(model, corpus, 8, "</s>", mode)
    whole = list(rows())
    assert len(whole) > 60
    going = rows()
    for n in range(0, len(whole), 17):
        state = json.loads(json.dumps(going.state()))
        assert list(rows(state)) == whole[n:]
        list(islice(going, 17))


def test_going_on_tokenises_only_what_is_left(model, monkeypatch):
    monkeypatch.setattr(tokens, "_DOCUMENTS_AT_ONCE", 7)
    rows = CorpusRows(model, open_corpus(DOCUMENTS), 8)
    going = rows()
    list(islice(going, 100))
    read, cut = [], tokens._tokenised
    monkeypatch.setattr(tokens, "_tokenised", lambda model, texts, end: read.extend(texts) or cut(model, texts, end))
    next(rows(going.state()))
    assert len(read) in (7, 14)
    assert read[0] in DOCUMENTS[60:]


def test_rows_do_not_depend_on_how_many_documents_are_tokenised_at_once(model, monkeypatch):
    whole = [list(CorpusRows(model, open_corpus(DOCUMENTS), 8, None, mode)()) for mode in MODES]
    monkeypatch.setattr(tokens, "_CHARACTERS_AT_ONCE", 20)
    assert [list(CorpusRows(model, open_corpus(DOCUMENTS), 8, None, mode)()) for mode in MODES] == whole


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_batches", [0, 3, 9, 31])
def test_a_stream_of_text_goes_on_over_the_end_of_a_pass(model, mode, n_batches):
    rows = CorpusRows(model, open_corpus(DOCUMENTS[:40]), 8, None, mode)
    read = [Site(1, "mlp_in")]
    settings = {"reads": read, "writes": (), "batch": 12, "chunk_tokens": 60, "seed": 0}
    unbroken = ActivationStream(model, rows, **settings)
    batches = iter(unbroken)
    list(islice(batches, n_batches))
    resumed = ActivationStream(model, rows, **settings, state=json.loads(json.dumps(unbroken.state())))
    for expected, found in islice(zip(batches, resumed, strict=False), 8):
        assert torch.equal(expected.reads, found.reads)
    assert resumed.state()["hash"] == unbroken.state()["hash"] != ""


@pytest.mark.parametrize("damage", [{"rest": 3}, {"rest": [1]}, {"row": -1}, {"row": 10**6}, {"documents": None}])
def test_a_damaged_place_is_refused(model, damage):
    rows = CorpusRows(model, open_corpus(DOCUMENTS), 8)
    with pytest.raises(FileFormatError, match=f"The place in the data has {next(iter(damage))} = .* start anew"):
        rows(rows().state() | damage)


def test_a_place_of_chunks_without_one_of_rows_is_refused():
    rows = TokenRows(torch.ones(4, 5, dtype=torch.int64))
    with pytest.raises(FileFormatError, match="The place in the data has rows = 'None'"):
        Chunks(rows, tokens=8, state={"chunk": 1, "row": 2})


# documents that do not see one another


def test_masked_and_separate_rows_hold_each_document_once_begun_as_a_text(model):
    documents = [text for i, text in enumerate(DOCUMENTS) if i % 20]
    encoded = model.tokenizer(documents, add_special_tokens=False)["input_ids"]
    expected = [[*ids, model.tokenizer.eos_token_id] for ids in encoded]
    for mode in ("masked", "separate"):
        rows = list(CorpusRows(model, open_corpus(DOCUMENTS), 8, None, mode)())
        parts = []
        for row in rows:
            ids = iter(row.ids)
            parts += [list(islice(ids, length)) for length in row.lengths]
        assert all(part[0] == model.bos for part in parts)
        said = list(chain.from_iterable(part[1:] for part in parts))
        assert said == list(chain.from_iterable(expected))[: len(said)]
        if mode == "masked":
            assert {len(row.ids) for row in rows} == {8}
            assert max(len(row.lengths) for row in rows) > 2
        else:
            assert {len(row.lengths) for row in rows} == {1}
            assert len(said) == sum(map(len, expected))


@pytest.mark.parametrize(
    ("family", "near"), [("gpt2", 1e-12), ("opt", 1e-12), ("gpt_neox", 1e-12), ("llama", 1e-5), ("gptj", 1e-5)]
)
def test_each_document_is_read_as_if_it_stood_alone(family, near):
    """The oracle: the model run on each document by itself."""
    model = random_model(family, d_model=16, n_heads=2, d_vocab=24, context=16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 1, 7, 3), (16,), (1, 1, 14), (2, 9)]
    rows = [Row(torch.randint(24, (sum(each),), generator=generator).tolist(), each) for each in lengths]
    sites = [Site(layer, kind) for layer in range(2) for kind in ("mlp_in", "mlp_out", "resid_post")]
    held, positions = stacked(rows)
    for first in (0, 1):
        found = sites_of(model, held, sites, (), first=first, positions=positions).reads
        expected = []
        for row in rows:
            ids = iter(row.ids)
            for length in row.lengths:
                alone = torch.tensor([list(islice(ids, length))])
                expected.append(sites_of(model, alone, sites, (), first=first).reads)
        torch.testing.assert_close(found, torch.cat(expected), atol=near, rtol=near)


def test_models_that_cannot_keep_documents_apart_are_refused(word_tokenizer):
    require_masked(random_model("llama", d_model=16, n_heads=2, context=16), 16)
    require_masked(random_model("mistral", d_model=16, n_heads=2, context=16), 4)  # its window is of three tokens
    for family in ("bloom", "mistral", "gemma2"):
        with pytest.raises(InputError, match='documents in a row of 16 tokens cannot be kept .*"separate"'):
            require_masked(random_model(family, d_model=16, n_heads=2, context=16), 16)


@pytest.mark.parametrize("mode", MODES)
def test_dictionaries_are_trained_on_each(model, tmp_path, mode):
    model.to("float32")
    settings = {"features": 8, "batch": 16, "context": 8, "buffer_mb": 1, "checkpoint_every": 5, "documents": mode}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    config = TranscoderConfig(tokens=16 * 8, **settings)
    unbroken: Any = train(model, tmp_path / "a.jsonl", config, progress=False)
    source = ModelSource(model, tmp_path / "a.jsonl", config)
    Trainer(source, [config], out=tmp_path / "run").run(until=5, progress=False)
    resumed: Any = train(model, tmp_path / "a.jsonl", config, out=tmp_path / "run", resume=True, progress=False)
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert unbroken.provenance.config["documents"] == mode


def test_documents_are_a_setting_of_text_and_of_a_stream(model):
    with pytest.raises(InputError, match="documents cannot be 'apart'; there are 'packed', 'masked', 'separate'"):
        config_from_json({"kind": "sae", "documents": "apart"})
    with pytest.raises(InputError, match="documents='separate' is of text"):
        train(model, torch.ones(4, 8, dtype=torch.int64), SAEConfig(documents="separate"), progress=False)
    with pytest.raises(InputError, match="share their documents"):
        train(model, DOCUMENTS, [SAEConfig(), SAEConfig(documents="masked")], progress=False)

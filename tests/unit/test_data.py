"""Corpora, packing, and the stream of shuffled activations."""

import json
from itertools import islice

import pytest
import torch

from transcoders import LanguageModel, held_out_rows, load_model, open_corpus, pack_rows, random_model, take_rows
from transcoders.data import ActivationStream, sites_of
from transcoders.errors import InputError, PromptError
from transcoders.sites import Site

READS = [Site(layer, "mlp_in") for layer in range(2)]
WRITES = [Site(layer, "mlp_out") for layer in range(2)]
CONTEXT = 9


@pytest.fixture(scope="module")
def model():
    return random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=50, context=16)


@pytest.fixture(scope="module")
def stories(shared) -> LanguageModel:
    return load_model(shared / "data/models/tinystories-656k")


def token_rows(n, seed=0):
    return torch.randint(0, 50, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


def stream(model, rows, **options):
    settings = {"reads": READS, "writes": WRITES, "batch": 10, "chunk_rows": 5, "seed": 0, **options}
    return ActivationStream(model, lambda: iter(rows.tolist()), **settings)


# corpora


def test_a_file_is_cut_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\n\nthree\n")
    corpus = open_corpus(tmp_path / "a.txt")
    assert list(corpus.documents()) == ["one", "two\nlines", "three"]
    assert corpus.name == "a.txt"
    assert corpus.separator_or(None) == "\n\n"
    assert corpus.separator_or(" ") == " "


def test_a_file_with_end_of_text_marks_is_cut_only_there(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nstill one<|endoftext|>two<|endoftext|>\n")
    corpus = open_corpus(str(tmp_path / "a.txt"))
    assert list(corpus.documents()) == ["one\n\nstill one", "two"]
    assert corpus.separator is None


def test_every_twentieth_document_is_held_out():
    documents = [str(i) for i in range(100)]
    corpus = open_corpus(documents)
    assert list(corpus.held_out()) == ["0", "20", "40", "60", "80"]
    assert sorted([*corpus.training(), *corpus.held_out()], key=int) == documents


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"no text file at .*absent\.txt"):
        open_corpus("absent.txt")


# packing


def test_rows_are_the_text_in_order_each_after_bos(stories):
    texts = ["One day a dog ran.", "It saw a cat."]
    rows = list(pack_rows(stories, texts * 20, context=10, separator="\n"))
    assert all(len(row) == 10 and row[0] == stories.bos for row in rows)
    flat = [token for row in rows for token in row[1:]]
    expected = [token for text in texts * 20 for token in stories.to_tokens(text + "\n", bos=False).tolist()]
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < 9


def test_without_a_separator_documents_are_divided_by_the_end_of_text_token(stories):
    rows = take_rows(stories, ["One day.", "It ran."] * 20, rows=3, context=12)
    assert int((rows == stories.tokenizer.eos_token_id).sum()) >= 3


def test_held_out_rows_share_no_document_with_training(stories):
    documents = [f"Number {i} went home. " * 12 for i in range(40)]
    rows = held_out_rows(stories, documents, tokens=10_000, context=16)
    assert rows.shape[1] == 16
    text = stories.tokenizer.decode(rows[:, 1:].flatten())
    assert "Number 0" in text
    assert "Number 20" in text
    assert "Number 7" not in text
    assert held_out_rows(stories, documents, tokens=0, context=16).shape == (0, 16)


def test_a_model_without_tokenizer_takes_no_text(model):
    with pytest.raises(PromptError, match="no tokenizer"):
        list(pack_rows(model, ["text"], context=8))


def test_a_context_the_model_cannot_take_is_refused(model):
    with pytest.raises(InputError, match="from 2 to 16"):
        list(pack_rows(model, ["text"], context=17))


# activations


def test_sites_of_leaves_out_the_first_position_and_is_the_models_own(model):
    rows = token_rows(3)
    found = sites_of(model, rows, READS, WRITES)
    _, cache = model.run(rows, [*READS, *WRITES])
    assert found.reads.shape == (3 * (CONTEXT - 1), 2, 16)
    for layer in range(2):
        torch.testing.assert_close(found.reads[:, layer], cache[READS[layer]][:, 1:].flatten(0, 1))
        torch.testing.assert_close(found.writes[:, layer], cache[WRITES[layer]][:, 1:].flatten(0, 1))


def test_a_chunk_is_dealt_out_once_and_shuffled_across_rows(model):
    rows = token_rows(5)
    everything = sites_of(model, rows, READS, WRITES)
    batches = list(islice(stream(model, rows), 4))  # 40 tokens, 10 at a time
    dealt = torch.cat([batch.reads for batch in batches])
    assert len(torch.unique(dealt.flatten(1), dim=0)) == len(torch.unique(everything.reads.flatten(1), dim=0))
    # Reads and writes stay together: each dealt pair is a pair of the chunk.
    where = torch.cdist(batches[0].reads.flatten(1), everything.reads.flatten(1)).argmin(dim=1)
    torch.testing.assert_close(batches[0].writes, everything.writes[where])
    rows_met = {int(i) // (CONTEXT - 1) for i in where}
    assert len(rows_met) > 2
    assert where.tolist() != sorted(where.tolist())


def test_the_stream_is_a_function_of_the_seed(model):
    rows = token_rows(20)
    first, again, other = (next(iter(stream(model, rows, seed=seed))).reads for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_stream_goes_on_where_another_stopped(model):
    rows = token_rows(13)
    unbroken = stream(model, rows)
    batches = iter(unbroken)
    for _ in range(6):
        next(batches)
    resumed = stream(model, rows, state=json.loads(json.dumps(unbroken.state())))
    for expected, found in islice(zip(batches, resumed, strict=False), 9):
        assert torch.equal(expected.reads, found.reads)
        assert torch.equal(expected.writes, found.writes)


def test_a_corpus_that_can_be_read_only_once_says_so(model):
    rows = iter(token_rows(6).tolist())
    once = ActivationStream(model, lambda: rows, reads=READS, writes=WRITES, batch=10, chunk_rows=5, seed=0)
    with pytest.raises(InputError, match="can be read again"):
        list(islice(once, 100))


def test_a_chunk_smaller_than_a_batch_is_refused(model):
    with pytest.raises(InputError, match="do not fill one batch of 1000"):
        next(iter(stream(model, token_rows(5), batch=1000)))

"""Every kind of text: the same documents, streamed, gone on with from a place, and refused in one clear sentence."""

import gzip
import itertools
import json
import random
import tracemalloc
from pathlib import Path

import datasets
import httpx
import pytest
import zstandard
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors

from transcoders.data import Corpus, open_corpus, text_files
from transcoders.errors import FileFormatError, InputError

DOCUMENTS = [f"Number {i} went\nhome, {'and ' * (i % 7)}slept." for i in range(90)]


def as_text(documents, end="\n\n"):
    return end.join(documents)


def as_lines(documents, column="text"):
    return "".join(json.dumps({column: text, "number": i}) + "\n" for i, text in enumerate(documents))


def text_file(folder):
    (folder / "a.txt").write_text(as_text(DOCUMENTS))
    return folder / "a.txt"


def marked_file(folder):
    (folder / "a.txt").write_text(as_text([text + "\n\n" for text in DOCUMENTS], "<|endoftext|>"))
    return folder / "a.txt"


def gzipped_text(folder):
    (folder / "a.txt.gz").write_bytes(gzip.compress(as_text(DOCUMENTS).encode()))
    return folder / "a.txt.gz"


def zstandard_text(folder):
    (folder / "a.txt.zst").write_bytes(zstandard.compress(as_text(DOCUMENTS).encode()))
    return folder / "a.txt.zst"


def folder_of_text(folder):
    for number in range(3):
        (folder / f"{number}.txt").write_text(as_text(DOCUMENTS[30 * number :][:30]))
    (folder / "notes.md").write_text("Not of the text.")
    return folder


def json_lines(folder):
    (folder / "a.jsonl").write_text(as_lines(DOCUMENTS))
    return folder / "a.jsonl"


def json_list(folder):
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    return folder / "a.json"


def gzipped_lines(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(DOCUMENTS).encode()))
    return folder / "a.jsonl.gz"


def zstandard_lines(folder):
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(as_lines(DOCUMENTS).encode()))
    return folder / "a.jsonl.zst"


def parquet(folder):
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def folder_of_lines(folder):
    for number in range(3):
        (folder / f"part-{number}.jsonl").write_text(as_lines(DOCUMENTS[30 * number :][:30]))
    return folder


def a_list(folder):
    return DOCUMENTS


def without_state(folder):
    return Corpus("mine", lambda: iter(DOCUMENTS))


SOURCES = [
    text_file, marked_file, gzipped_text, zstandard_text, folder_of_text, json_lines, json_list, gzipped_lines,
    zstandard_lines, parquet, folder_of_lines, a_list, without_state,
]  # fmt: skip


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__)
def corpus(request, tmp_path):
    return open_corpus(request.param(tmp_path))


def test_documents_are_those_of_the_source_pass_after_pass(corpus):
    assert list(corpus.documents()) == DOCUMENTS
    assert list(corpus.documents()) == DOCUMENTS
    assert list(corpus.held_out()) == DOCUMENTS[::20]


@pytest.mark.parametrize("read", [0, 1, 30, 57, 90])
def test_a_pass_goes_on_where_another_was(corpus, read):
    whole = list(corpus.training())
    first = corpus.training()
    seen = list(itertools.islice(first, read))
    state = json.loads(json.dumps(first.state()))
    assert seen == whole[:read]
    assert list(corpus.training(state)) == whole[read:]
    assert list(first) == whole[read:]  # saying where it is does not move it


def test_a_pass_is_gone_on_with_again_and_again(corpus):
    """Of `datasets` 5.0 the second place is the first one's beginning: huggingface/datasets#8308."""
    whole, found, state = list(corpus.training()), [], None
    while some := list(itertools.islice(passing := corpus.training(state), 7)):
        found += some
        state = json.loads(json.dumps(passing.state()))
    assert found == whole


def test_a_place_that_stands_still_once_loaded_is_counted_on_from(tmp_path, monkeypatch):
    corpus = open_corpus(json_lines(tmp_path))
    first = corpus.training()
    list(itertools.islice(first, 10))
    resumed = corpus.training(first.state())
    monkeypatch.setattr(datasets.IterableDataset, "state_dict", lambda self: {"stands": "still"})
    list(itertools.islice(resumed, 30))
    state = resumed.state()
    assert (state["source"]["since"], state["source"]["record"]) == (32, 43)
    assert list(corpus.training(state)) == list(corpus.training())[40:]


def test_a_place_is_found_without_reading_what_came_before(tmp_path, monkeypatch):
    path = text_file(tmp_path)
    corpus = open_corpus(path)
    first = corpus.training()
    expected = [next(first) for _ in range(60)][-1]
    state = first.state()
    content = path.read_bytes()
    path.write_bytes(b"x" * state["source"]["byte"] + content[state["source"]["byte"] :])
    assert expected not in (rest := list(corpus.training(state)))
    assert rest == list(first)
    assert not any("x" * 10 in text for text in rest)


# text files


def plainly(path: Path) -> list[str]:
    """The documents by reading all at once."""
    text = path.read_text(encoding="utf-8")
    mark = "<|endoftext|>" if "<|endoftext|>" in text else "\n\n"
    return [piece.strip() for piece in text.split(mark) if piece.strip()]


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_a_text_is_cut_as_if_it_were_read_whole(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    path, choose = tmp_path / "a.txt", random.Random(block)
    parts = ["a", "é", "🎈", " ", "\n", "\n", "\r\n", "\r", "\n\n", "<|endof", "text|>"]
    for number in range(60):
        mark = ["<|endoftext|>"] * (number % 2)
        text = "z" + "".join(choose.choices(parts + mark, k=50))
        path.write_bytes(text.encode())
        documents = text_files.TextFiles([path])
        assert list(documents()) == plainly(path)
        passing = documents()
        head = list(itertools.islice(passing, 4))
        assert head + list(documents(passing.state())) == plainly(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "large.txt"
    document = "word " * 400 + "\n\n"
    path.write_text(document * 6_000)
    assert path.stat().st_size > 12e6
    tracemalloc.start()
    corpus = open_corpus(path)
    assert sum(1 for _ in corpus.documents()) == 6_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    assert list(open_corpus(tmp_path / "a.txt").documents()) == ["one", "two"]


def test_another_text_is_not_gone_on_with(tmp_path):
    path = text_file(tmp_path)
    first = open_corpus(path).training()
    next(first)
    with path.open("a") as file:
        file.write("more")
    with pytest.raises(InputError, match=r"a\.txt now has [\d,]+ bytes, and had [\d,]+ when it was read before"):
        open_corpus(path).training(first.state())


# data sets of the hub, as they lie here once downloaded


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of two configurations and two splits under the name some/texts, of which nobody needs to be asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "datasets--some--texts" / "snapshots" / "0"
    refs = tmp_path / "datasets--some--texts" / "refs"
    for folder in (snapshot / "en", snapshot / "de", refs):
        folder.mkdir(parents=True)
    (refs / "main").write_text("0")
    (refs / "v1").write_text("0")
    (snapshot / "en" / "train.jsonl").write_text(as_lines(DOCUMENTS))
    (snapshot / "en" / "validation.jsonl").write_text(as_lines(["Of the validation."]))
    (snapshot / "de" / "train.jsonl").write_text(as_lines(["Nummer eins."], column="inhalt"))
    (snapshot / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files:\n  - split: train\n    path: en/train.jsonl\n"
        "  - split: validation\n    path: en/validation.jsonl\n"
        "- config_name: de\n  data_files: de/train.jsonl\n---\n"
    )
    return "some/texts"


def test_a_data_set_is_read_by_configuration_split_revision_and_column(hub):
    english = open_corpus(hub, config="en")
    assert (english.name, english.separator) == ("some/texts (config en)", None)
    assert list(english.documents()) == DOCUMENTS
    first = english.training()
    head = list(itertools.islice(first, 33))
    assert head + list(english.training(json.loads(json.dumps(first.state())))) == list(english.training())
    validation = open_corpus(hub, config="en", split="validation", revision="v1")
    assert validation.name == "some/texts (config en, split validation, revision v1)"
    assert list(validation.documents()) == ["Of the validation."]
    german = open_corpus(hub, config="de", column="inhalt")
    assert (german.name, list(german.documents())) == ("some/texts (config de, column inhalt)", ["Nummer eins."])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"some/texts has several configurations; choose one with config \(--corpus-config\): (en, de|de, en)"),
        ({"config": "fr"}, r"has no configuration 'fr'; choose one .*: (en, de|de, en)"),
        ({"config": "en", "split": "test"}, "has no split 'test'; it has train, validation"),
        ({"config": "de"}, r"has no column 'text'; it has inhalt, number: choose .*column \(--corpus-column\)"),
        ({"config": "de", "column": "number"}, "holds 0 in record 1, which is int; choose a column of text"),
        ({"revision": "v2"}, "The revision 'v2' of the data set 'some/texts' is not on this machine"),
    ],
)
def test_what_a_data_set_does_not_have_is_refused_with_what_it_has(hub, settings, said):
    with pytest.raises(InputError, match=said):
        open_corpus(hub, **settings)


# refusals


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pdf", b"text", r"a\.pdf cannot be read for its suffix '\.pdf'; expected \.txt, \.jsonl"),
        ("a.txt", b"", "is empty; give text"),
        ("a.txt", b" \n\n \n", "is empty; give text"),
        ("a.jsonl", b"", "is empty; give text"),
        ("a.txt", "naïve".encode("latin-1"), r"is not UTF-8: byte 2 is 0xef; convert it to UTF-8"),
        ("a.jsonl", b'{"text": "a\xff"}\n', "is not UTF-8: there is the byte 0xff"),
        ("a.jsonl", b'{"text": "a"\n{', r"Could not read .*a\.jsonl \(.+\); give whole files"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', "has no column 'text'; it has body, id"),
        ("a.json", b'[{"text": 3}]', "holds 3 in record 1, which is int"),
        ("a.parquet", b"no parquet", r"Could not read .*a\.parquet \(.+\); give whole files"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.txt\.gz cannot be read \(.+\); give a whole file"),
        ("a.txt.zst", b"no zstandard", r"a\.txt\.zst cannot be read \(.+\); give a whole file"),
    ],
)
def test_a_file_that_is_no_text_is_refused_at_once(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_corpus(tmp_path / name)


def test_text_that_is_spoilt_later_on_is_refused_where_it_is_reached(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\nalso fine\n\n\xffno\n\n")
    documents = open_corpus(tmp_path / "a.txt").documents()
    assert [next(documents), next(documents)] == ["fine", "also fine"]
    with pytest.raises(FileFormatError, match="byte 17 is 0xff"):
        next(documents)


def test_a_missing_text_is_a_document_still(tmp_path):
    """So that every twentieth document stays the same."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "c"}\n')
    assert list(open_corpus(tmp_path / "a.jsonl").documents()) == ["a", "", "c"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], r"has no file of text; expected \.txt"),
        (["notes.md", ".hidden.txt", "dataset_info.json"], "has no file of text"),
        (["a.txt", "deeper/b.jsonl"], r"mixes kinds of files \(.*a\.txt.*\); give it files of one kind"),
    ],
)
def test_a_folder_holds_files_of_one_kind(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=said):
        open_corpus(tmp_path)


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        (text_file, {"column": "body"}, r"column = 'body' has no meaning for the text file .*a\.txt; leave it out"),
        (text_file, {"config": "en"}, r"config = 'en' has no meaning for the file"),
        (json_lines, {"revision": "v1"}, r"revision = 'v1' has no meaning for the file"),
        (folder_of_text, {"split": "test"}, r"split = 'test' has no meaning for the folder"),
        (a_list, {"split": "test"}, r"split = 'test' has no meaning for documents"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, source, settings, said):
    with pytest.raises(InputError, match=said):
        open_corpus(source(tmp_path), **settings)


@pytest.mark.parametrize(
    "state",
    [
        {"document": -1},
        {"document": "3"},
        {"document": 3, "source": 4},
        {"document": 3, "source": {"dataset": {}}},
        {"document": 3, "source": {"record": 3, "since": 0, "dataset": {"file": 1}}},
    ],
)
@pytest.mark.parametrize("source", [text_file, json_lines])
def test_a_damaged_place_is_refused(tmp_path, source, state):
    corpus = open_corpus(source(tmp_path))
    with pytest.raises(FileFormatError, match="The place in the data has .* start anew"):
        next(corpus.training(state))


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (errors.GatedRepoError, r"some/texts \(it is gated: ask for access on its page, .*\); check the name"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_with_its_reason(monkeypatch, cause, said):
    def refuse(*_, **__):
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
        raise DatasetNotFoundError("not there") from cause("403", response=response)

    monkeypatch.setattr("transcoders.data.corpora.folder_or_name", lambda name, *_: name)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=said):
        open_corpus("some/texts")

"""Activations on disk hold what the model gave, whole or not at all, by whatever jobs and kills they came there."""

import errno
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

import transcoders.files
from tests.small_stores import (
    BLOCK,
    CONTEXT,
    ROWS,
    SITES,
    everything,
    files_of,
    in_order,
    rows_of,
    write,
    write_whole,
)
from transcoders import (
    ActivationStore,
    write_activations,
)
from transcoders.data import sites_of, store_writing
from transcoders.data.shards import GROUP, compress, decompress, quantise
from transcoders.data.tokens import CorpusRows
from transcoders.errors import FileFormatError, InputError, NotFiniteError, WriteError
from transcoders.sites import Frame, Site

# int8


def test_int8_is_the_nearest_whole_number_of_a_scale_for_each_group():
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 7).unsqueeze(1)
    x[0, :GROUP] = 0
    x[1, 3] *= 1e4  # an outlier spoils its own group alone
    q, scale = quantise(x)
    found = decompress(compress(x), 7, 100)
    for token in range(7):
        for i in range(100):
            group = range(i // GROUP * GROUP, min(100, (i // GROUP + 1) * GROUP))
            largest = max(abs(float(x[token, j])) for j in group)
            step = float(scale[i // GROUP, token])
            assert largest / 127 <= step * (1 + 1e-12)
            assert step <= largest / 127 * (1 + 2**-7)
            assert abs(float(found[token, i]) - float(x[token, i])) <= step / 2 * (1 + 1e-5)
            assert float(found[token, i]) == float(q[i, token]) * step
    assert q.abs().max() == 127


@pytest.mark.parametrize("frame", [b"", b"nothing of zstd's", "other"])
def test_a_frame_of_something_else_is_refused(frame):
    with pytest.raises(ValueError, match="."):
        decompress(compress(torch.ones(3, 8)) if frame == "other" else frame, 4, 8)


# what is written


def test_a_float32_store_holds_the_models_activations_each_once(store_model, stores):
    store = stores["float32"]
    found, expected = everything(store), sites_of(store_model, ROWS, SITES, ()).reads
    assert store.tokens == len(expected) == 400 * 16
    assert [shard.tokens for shard in store.shards] == [2720, 2720, 960]
    assert store.sites == SITES
    torch.testing.assert_close(in_order(found), in_order(expected), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, expected)


def test_a_store_is_shuffled_across_the_rows_of_a_shard(store_model, stores):
    found, text = everything(stores["float32"])[:BLOCK], sites_of(store_model, ROWS[:170], SITES, ()).reads
    token = torch.cdist(found.flatten(1), text.flatten(1)).argmin(dim=1)
    rows = token // (CONTEXT - 1)
    assert len(rows.unique()) > 160
    assert abs(np.corrcoef(token, np.arange(BLOCK))[0, 1]) < 0.15


def test_bf16_and_int8_hold_the_same_to_their_precision_in_fewer_bytes(stores):
    exact = everything(stores["float32"])
    assert torch.equal(everything(stores["bf16"]), exact.bfloat16().float())
    step = exact.abs().amax(dim=2, keepdim=True) / 127 * (1 + 2**-7)  # 16 coordinates are one group
    assert ((everything(stores["int8"]) - exact).abs() <= step / 2 * (1 + 1e-5)).all()
    assert stores["float32"].smaller == pytest.approx(1, abs=0.01)
    assert stores["bf16"].smaller == pytest.approx(2, abs=0.02)
    assert stores["int8"].smaller > 3.4  # a scale for each 16 numbers


def test_a_store_says_what_it_holds(store_model, stores, tmp_path):
    kept = stores["int8"].settings
    assert (kept.model, kept.fingerprint, kept.frame) == (store_model.name, store_model.fingerprint(), Frame())
    assert (kept.corpus, kept.context, kept.first, kept.dtype) == ("rows of tokens", CONTEXT, 1, "int8")
    assert repr(stores["int8"]).startswith(f"ActivationStore('{stores['int8'].folder}': 6,400 tokens of 'rows of")
    whole = write(store_model, tmp_path, ROWS[:9], first=0, sites=[Site(1, "resid_post")], tokens=100)
    assert whole is not None
    assert whole.tokens == 6 * CONTEXT  # the rows that hold a hundred
    torch.testing.assert_close(
        in_order(everything(whole, whole.sites)),
        in_order(sites_of(store_model, ROWS[:6], whole.sites, (), first=0).reads),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_tokens_of_massive_activations_are_left_out_and_the_store_says_above_which_norms(store_model, tmp_path):
    store = write_whole(store_model, tmp_path, outliers=1.3)
    rows = ROWS[: -(-2048 // CONTEXT)]  # the sample that limits are taken from
    sample, every = (sites_of(store_model, part, SITES, ()).reads.double().norm(dim=2) for part in (rows, ROWS))
    for i, site in enumerate(SITES):
        assert store.settings.limits[site] == pytest.approx(1.3 * float(sample[:, i].median()), rel=1e-5)
    kept = (every <= torch.tensor([store.settings.limits[site] for site in SITES])).all(dim=1)
    assert 100 < int((~kept).sum()) < 6000
    expected = sites_of(store_model, ROWS, SITES, ()).reads[kept]
    torch.testing.assert_close(in_order(everything(store)), in_order(expected), rtol=1e-5, atol=1e-5)
    assert write_whole(store_model, tmp_path / "all", outliers=0.0).settings.limits == {}


def test_text_is_read_as_training_reads_it(stories, tmp_path):
    documents = [f"Number {i} went home with a dog. " * 6 for i in range(60)]
    store = write_activations(stories, documents, tmp_path, sites=[Site(0, "resid_post")], context=16, progress=False)
    assert store is not None
    rows = torch.tensor(list(transcoders.pack_rows(stories, transcoders.open_corpus(documents).training(), context=16)))
    expected = sites_of(stories, rows, store.sites, ()).reads
    torch.testing.assert_close(in_order(everything(store, store.sites)), in_order(expected), rtol=1e-5, atol=1e-5)
    assert store.settings.bos


def test_documents_can_be_kept_apart(stories, tmp_path):
    documents = ["A dog ran home. " * n for n in range(1, 30)]
    sites = [Site(0, "mlp_out"), Site(1, "resid_post")]
    store = write_activations(
        stories, documents, tmp_path, sites=sites, context=20, documents="separate", outliers=0.0, progress=False
    )
    assert store is not None
    rows = CorpusRows(stories, transcoders.open_corpus(documents), 20, None, "separate")()
    alone = [sites_of(stories, torch.tensor([row.ids]), store.sites, ()).reads for row in rows]
    found = in_order(everything(store, store.sites))
    torch.testing.assert_close(found, in_order(torch.cat(alone)), rtol=1e-3, atol=1e-4)
    assert store.settings.documents == "separate"


@pytest.fixture(scope="module")
def stories(shared):
    return transcoders.load_model(shared / "data/models/tinystories-656k")


# jobs


def in_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_jobs_in_processes_write_the_store_of_one(store_model, stores, tmp_path):
    processes = [in_process(lambda n: write(store_model, tmp_path, dtype="int8", job=(n, 2)), n) for n in (1, 2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(tmp_path) == files_of(stores["int8"].folder)
    assert not (tmp_path / "parts").exists()
    again = write(store_model, tmp_path, dtype="int8")  # nothing is left to do
    assert again is not None
    assert again.digest == stores["int8"].digest


@pytest.mark.parametrize("there", [False, True], ids=["writes", "removes"])
def test_another_job_writes_or_removes_a_part_in_the_moment_that_it_is_read(store_model, tmp_path, monkeypatch, there):
    write(store_model, tmp_path, dtype="int8", job=(1, 3))
    part, read = tmp_path / "parts" / "00000.json", store_writing.read_record
    text = part.read_bytes()
    if not there:
        part.unlink()

    def meanwhile(path, schema):
        if path == part and there:
            part.unlink(missing_ok=True)
        try:
            return read(path, schema)
        finally:
            if path == part and not there:
                part.write_bytes(text)

    monkeypatch.setattr(store_writing, "read_record", meanwhile)
    assert write(store_model, tmp_path, dtype="int8", job=(2, 3)) is None


def test_a_job_alone_leaves_the_store_open_and_any_other_division_ends_it(store_model, stores, tmp_path):
    assert write(store_model, tmp_path, dtype="int8", job=(2, 3)) is None
    with pytest.raises(FileFormatError, match=r"There is no .*store\.json, so .* or one that is not complete"):
        ActivationStore(tmp_path)
    ended = write(store_model, tmp_path, dtype="int8")
    assert ended is not None
    assert files_of(tmp_path) == files_of(stores["int8"].folder)


def test_a_job_killed_at_any_moment_goes_on_after_its_last_whole_shard(store_model, stores, tmp_path):
    """Killed while it waits for the disk to take `writing.json`, each shard and its part, and `store.json`."""

    def killed(moment):
        left, fsync = [moment], os.fsync

        def wait(handle):
            left[0] -= 0 if os.path.isdir(f"/proc/self/fd/{handle}") else 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        transcoders.files.os.fsync = wait
        write(store_model, tmp_path, dtype="int8")

    for moment in (1, 2, 2, 3, 4, 3, 1):
        process = in_process(killed, moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "store.json").exists()
    half = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp"))
    assert half
    assert write(store_model, tmp_path, dtype="int8") is not None
    written = {name: content for name, content in files_of(tmp_path).items() if name not in half}
    assert written == files_of(stores["int8"].folder)


def test_a_full_disk_is_one_sentence_and_what_was_written_stays(store_model, stores, tmp_path, monkeypatch):
    write(store_model, tmp_path, dtype="int8", job=(1, 3))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(transcoders.files.os, "fsync", full)
        with pytest.raises(WriteError, match=r"Cannot write .*shard-00001.*: the disk with .* is full"):
            write(store_model, tmp_path, dtype="int8")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write(store_model, tmp_path, dtype="int8")
    assert files_of(tmp_path) == files_of(stores["int8"].folder)


def test_a_job_of_other_settings_or_another_text_is_refused(store_model, tmp_path):
    write(store_model, tmp_path, job=(1, 2))
    with pytest.raises(
        InputError, match=r"holds other activations: its dtype is 'float32', not 'bf16'\. .*another fold"
    ):
        write(store_model, tmp_path, job=(2, 2), dtype="bf16")
    with pytest.raises(InputError, match=r"shard-00000\.safetensors was written from another text"):
        write(store_model, tmp_path, rows_of(400, seed=5), job=(2, 2))
    write(store_model, tmp_path, job=(2, 2))
    with pytest.raises(InputError, match="holds other activations: its seed is 0, not 1"):
        write(store_model, tmp_path, seed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sites": ()}, "nothing to write; give at least one site"),
        ({"sites": [Site(2, "mlp_in")]}, r"has no site 2\.mlp_in; its layers are 0 to 1"),
        ({"sites": ["mlp_in", "mlp_neurons"]}, r"one width; got widths \[16, 64\]"),
        ({"job": (3, 2)}, "no job 3 of 2"),
        ({"tokens": 0}, "tokens must be at least 1; got 0"),
        ({"first": CONTEXT}, "first=17 leaves nothing of rows of 17 tokens"),
        ({"outliers": 0.5}, "above 1, or 0; got 0.5"),
        ({"shard_mb": 0}, "shard_mb=0 does not hold one row"),
        ({"rows": ROWS[:0]}, "does not fill a row"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(store_model, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        write(store_model, tmp_path, **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_activations_that_are_not_finite_are_not_written(store_model, tmp_path, monkeypatch):
    def spoilt(*arguments, **options):
        found = sites_of(*arguments, **options)
        found.reads[5 * (CONTEXT - 1) + 3, 2, 0] = torch.nan
        return found

    monkeypatch.setattr(store_writing, "sites_of", spoilt)
    with pytest.raises(NotFiniteError, match=r"0\.resid_post are not finite at position 4 of row 5 of the text"):
        write(store_model, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))

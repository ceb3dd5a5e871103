"""Activations on disk: what is read is what the model gave, in an order that can be gone on with, whole or refused."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import transcoders.files
from circuitsae.cli import main
from transcoders import (
    ActivationStore,
    CLTConfig,
    SAEConfig,
    evaluate,
    load_dictionaries,
    random_model,
    train,
    write_activations,
)
from transcoders.data import StoreStream, sites_of, store_writing
from transcoders.data.ahead import read_ahead
from transcoders.data.shards import GROUP, compress, decompress, quantise
from transcoders.errors import DictionaryError, FileFormatError, InputError, NotFiniteError, WriteError
from transcoders.sites import Frame, Site
from transcoders.training import Trainer
from transcoders.training.metrics import Wait
from transcoders.training.stored import StoreSource, as_stored

CONTEXT, D_MODEL, BLOCK = 17, 16, 600
KINDS = ("resid_post", "mlp_in", "mlp_out")
SITES = tuple(Site(layer, kind) for layer in range(2) for kind in ("mlp_in", "mlp_out", "resid_post"))


def rows_of(n, seed=0):
    return torch.randint(0, 30, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


ROWS = rows_of(400)
"""Of 16 tokens with activations: three shards of a megabyte, the last one smaller."""


@pytest.fixture(scope="module")
def model():
    return random_model(n_layers=2, d_model=D_MODEL, n_heads=2, d_vocab=30, context=32, seed=1)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writing, "_MOST_IN_BLOCK", BLOCK)
        yield


def write(model, out, rows=ROWS, **options):
    return write_activations(model, rows, out, **{"sites": KINDS, "shard_mb": 1, "progress": False, **options})


@pytest.fixture(scope="module")
def stores(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {dtype: write(model, folder / dtype, dtype=dtype) for dtype in ("float32", "bf16", "int8")}


@pytest.fixture
def copied(stores, tmp_path):
    return Path(shutil.copytree(stores["int8"].folder, tmp_path / "copied"))


def everything(store, sites=SITES):
    """All that is stored, in the order in which it was written."""
    blocks = [
        store.read(shard, block, sites) for shard in range(len(store.shards)) for block in range(store.blocks(shard))
    ]
    return torch.cat(blocks)


def in_order(tokens):
    """Tokens in an order of their own."""
    return tokens[np.lexsort(tokens.flatten(1).double().numpy().T)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


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


def test_a_float32_store_holds_the_models_activations_each_once(model, stores):
    store = stores["float32"]
    found, expected = everything(store), sites_of(model, ROWS, SITES, ()).reads
    assert store.tokens == len(expected) == 400 * 16
    assert [shard.tokens for shard in store.shards] == [2720, 2720, 960]
    assert store.sites == SITES
    torch.testing.assert_close(in_order(found), in_order(expected), rtol=0, atol=0)
    assert not torch.equal(found, expected)


def test_a_store_is_shuffled_across_the_rows_of_a_shard(model, stores):
    found, text = everything(stores["float32"])[:BLOCK], sites_of(model, ROWS[:170], SITES, ()).reads
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


def test_a_store_says_what_it_holds(model, stores, tmp_path):
    kept = stores["int8"].settings
    assert (kept.model, kept.fingerprint, kept.frame) == (model.name, model.fingerprint(), Frame())
    assert (kept.corpus, kept.context, kept.first, kept.dtype) == ("rows of tokens", CONTEXT, 1, "int8")
    assert repr(stores["int8"]).startswith(f"ActivationStore('{stores['int8'].folder}': 6,400 tokens of 'rows of")
    whole = write(model, tmp_path, ROWS[:9], first=0, sites=[Site(1, "resid_post")], tokens=100)
    assert whole is not None
    assert whole.tokens == 6 * CONTEXT  # the rows that hold a hundred
    torch.testing.assert_close(
        in_order(everything(whole, whole.sites)),
        in_order(sites_of(model, ROWS[:6], whole.sites, (), first=0).reads),
        rtol=0, atol=0,
    )  # fmt: skip


def test_text_is_read_as_training_reads_it(stories, tmp_path):
    documents = [f"Number {i} went home with a dog. " * 6 for i in range(60)]
    store = write_activations(stories, documents, tmp_path, sites=[Site(0, "resid_post")], context=16, progress=False)
    assert store is not None
    rows = torch.tensor(list(transcoders.pack_rows(stories, transcoders.open_corpus(documents).training(), context=16)))
    expected = sites_of(stories, rows, store.sites, ()).reads
    torch.testing.assert_close(in_order(everything(store, store.sites)), in_order(expected), rtol=0, atol=0)
    assert store.settings.bos


@pytest.fixture(scope="module")
def stories(shared):
    return transcoders.load_model(shared / "data/models/tinystories-656k")


# jobs


def in_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_jobs_in_processes_write_the_store_of_one(model, stores, tmp_path):
    processes = [in_process(lambda n: write(model, tmp_path, dtype="int8", job=(n, 2)), n) for n in (1, 2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(tmp_path) == files_of(stores["int8"].folder)
    assert not (tmp_path / "parts").exists()
    again = write(model, tmp_path, dtype="int8")  # nothing is left to do
    assert again is not None
    assert again.digest == stores["int8"].digest


def test_a_job_alone_leaves_the_store_open_and_any_other_division_ends_it(model, stores, tmp_path):
    assert write(model, tmp_path, dtype="int8", job=(2, 3)) is None
    with pytest.raises(FileFormatError, match=r"There is no .*store\.json, so .* or one that is not complete"):
        ActivationStore(tmp_path)
    ended = write(model, tmp_path, dtype="int8")
    assert ended is not None
    assert files_of(tmp_path) == files_of(stores["int8"].folder)


def test_a_job_killed_at_any_moment_goes_on_after_its_last_whole_shard(model, stores, tmp_path):
    """Killed while it waits for the disk to take `writing.json`, each shard and its part, and `store.json`."""

    def killed(moment):
        left, fsync = [moment], os.fsync

        def wait(handle):
            left[0] -= 0 if os.path.isdir(f"/proc/self/fd/{handle}") else 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        transcoders.files.os.fsync = wait
        write(model, tmp_path, dtype="int8")

    for moment in (1, 2, 2, 3, 4, 3, 1):
        process = in_process(killed, moment)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "store.json").exists()
    half = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp"))
    assert half
    assert write(model, tmp_path, dtype="int8") is not None
    written = {name: content for name, content in files_of(tmp_path).items() if name not in half}
    assert written == files_of(stores["int8"].folder)


def test_a_full_disk_is_one_sentence_and_what_was_written_stays(model, stores, tmp_path, monkeypatch):
    write(model, tmp_path, dtype="int8", job=(1, 3))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(transcoders.files.os, "fsync", full)
        with pytest.raises(WriteError, match=r"Cannot write .*shard-00001.*: the disk with .* is full"):
            write(model, tmp_path, dtype="int8")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write(model, tmp_path, dtype="int8")
    assert files_of(tmp_path) == files_of(stores["int8"].folder)


def test_a_job_of_other_settings_or_another_text_is_refused(model, tmp_path):
    write(model, tmp_path, job=(1, 2))
    with pytest.raises(
        InputError, match=r"holds other activations: its dtype is 'float32', not 'bf16'\. .*another fold"
    ):
        write(model, tmp_path, job=(2, 2), dtype="bf16")
    with pytest.raises(InputError, match=r"shard-00000\.safetensors was written from another text"):
        write(model, tmp_path, rows_of(400, seed=5), job=(2, 2))
    write(model, tmp_path, job=(2, 2))
    with pytest.raises(InputError, match="holds other activations: its seed is 0, not 1"):
        write(model, tmp_path, seed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sites": ()}, "nothing to write; give at least one site"),
        ({"sites": [Site(2, "mlp_in")]}, r"has no site 2\.mlp_in; its layers are 0 to 1"),
        ({"sites": ["mlp_in", "mlp_neurons"]}, r"one width; got widths \[16, 64\]"),
        ({"job": (3, 2)}, "no job 3 of 2"),
        ({"tokens": 0}, "tokens must be at least 1; got 0"),
        ({"first": CONTEXT}, "first=17 leaves nothing of rows of 17 tokens"),
        ({"shard_mb": 0}, "shard_mb=0 does not hold one row"),
        ({"rows": ROWS[:0]}, "does not fill a row"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(model, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        write(model, tmp_path, **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_activations_that_are_not_finite_are_not_written(model, tmp_path, monkeypatch):
    def spoilt(*arguments, **options):
        found = sites_of(*arguments, **options)
        found.reads[5 * (CONTEXT - 1) + 3, 2, 0] = torch.nan
        return found

    monkeypatch.setattr(store_writing, "sites_of", spoilt)
    with pytest.raises(NotFiniteError, match=r"0\.resid_post are not finite at position 4 of row 5 of the text"):
        write(model, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


# what is read


def batches(store, n, *, batch=100, seed=0, sites=SITES, **options):
    return [batch.reads for batch in islice(StoreStream(store, sites, batch=batch, seed=seed, **options), n)]


def test_an_epoch_deals_every_token_once_in_an_order_of_its_own(stores):
    store = stores["float32"]
    first, second = (torch.cat(part) for part in (lambda all: (all[:64], all[64:]))(batches(store, 128)))
    written = everything(store)
    for dealt in (first, second):
        assert torch.equal(in_order(dealt), in_order(written))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.cat(batches(store, 64, seed=1)))


def test_batches_run_across_blocks_and_shards_and_the_rest_of_an_epoch_is_left_out(stores):
    found = batches(stores["float32"], 5, batch=2500)
    assert [len(batch) for batch in found] == [2500] * 5
    one_by_one = torch.cat(batches(stores["float32"], 64))
    assert torch.equal(torch.cat(found[:2]), one_by_one[:5000])
    assert torch.equal(torch.cat(found[2:4]), torch.cat(batches(stores["float32"], 128)[64:])[:5000])


def test_runs_that_share_a_store_get_identical_batches(stores):
    one, two, three = (batches(stores["int8"], 70, buffer_mb=mb) for mb in (0, 1, 512))
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    fewer = batches(stores["int8"], 70, sites=SITES[1:4])
    assert all(torch.equal(a, b[:, 1:4]) for a, b in zip(fewer, one, strict=True))


@pytest.mark.parametrize("done", [0, 1, 7, 63, 64, 65, 130])
def test_a_stream_goes_on_where_another_stopped(stores, done):
    unbroken = StoreStream(stores["bf16"], SITES, batch=100, seed=3)
    rest = iter(unbroken)
    for _ in range(done):
        next(rest)
    state = json.loads(json.dumps(unbroken.state()))
    assert (state["chunk"], state["batch_in_chunk"]) == divmod(done, 64)
    resumed = StoreStream(stores["bf16"], SITES, batch=100, seed=3, state=state)
    for expected, found in islice(zip(rest, resumed, strict=False), 5):
        assert torch.equal(expected.reads, found.reads)


def test_a_row_of_a_batch_is_traced_to_its_shard(stores):
    store = stores["float32"]
    stream = StoreStream(store, SITES, batch=100, seed=0)
    for batch in islice(stream, 3):
        for row in (0, 50, 99):
            _, token, _, name = stream.place(row).split()
            shard = [shard.file for shard in store.shards].index(name)
            block, within = divmod(int(token), BLOCK)
            assert torch.equal(store.read(shard, block, SITES)[within], batch.reads[row])


def test_what_a_stream_cannot_do_is_refused(stores):
    store = stores["float32"]
    with pytest.raises(
        InputError, match=r"lacks the activations at 0\.attn_out; it has 0\.mlp_in, 0\.mlp_out, 0\.resid"
    ):
        StoreStream(store, [Site(0, "attn_out")], batch=10, seed=0)
    with pytest.raises(InputError, match="The 6,400 tokens of .* do not fill one batch of 7,000"):
        StoreStream(store, SITES, batch=7000, seed=0)
    state = StoreStream(store, SITES, batch=10, seed=0).state()
    with pytest.raises(InputError, match="is not the store that this run began with"):
        StoreStream(stores["bf16"], SITES, batch=10, seed=0, state=state)
    with pytest.raises(InputError, match="epoch 0, batch 640, is none in a store of 640"):
        StoreStream(store, SITES, batch=10, seed=0, state={**state, "batch_in_chunk": 640})


def test_a_store_of_another_model_is_refused(stores, model):
    stores["int8"].require_model(model)
    other = random_model(n_layers=2, d_model=D_MODEL, n_heads=2, d_vocab=30, context=32, seed=9)
    with pytest.raises(DictionaryError, match="with the fingerprint .*; .* has .*"):
        stores["int8"].require_model(other)


# damage


def edited(**change):
    def damage(folder):
        path = folder / "store.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def flipped(folder):
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


def foreign(folder):
    """Another store's shard, padded to the size."""
    path = folder / "shard-00000.safetensors"
    other = (folder / "shard-00001.safetensors").read_bytes()
    path.write_bytes(other[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, r"shard-00001.* is not the shard that was written \(its SHA-256 is not the one in store\.json\)"),
        (foreign, r"shard-00000.* is not the shard that was written \(its SHA-256"),
        (cut("shard-00002.safetensors"), r"shard-00002.* \(it has [\d,]+ bytes instead of [\d,]+\)"),
        (lambda folder: (folder / "shard-00001.safetensors").unlink(), r"There is no shard .*shard-00001"),
        (lambda folder: (folder / "store.json").unlink(), r"There is no .*store\.json"),
        (cut("store.json"), r"Cannot read .*store\.json"),
        (edited(version=2), r"does not describe activations \(version: 1 was expected"),
        (edited(shards=[]), r"does not describe activations \(shards"),
        (edited(sites=["0.nothing"]), r"names a site that is none"),
        (edited(sites=["0.attn_out"]), r"shard-\d+.* \(it lacks 0\.attn_out\)"),
        (edited(d_model=32), r"tokens \d+ to \d+ of 0\.mlp_in cannot be decompressed"),
        (edited(dtype="float32"), r"\(0\.mlp_in is \[\d+\] of torch\.uint8"),
    ],
    ids=["flipped", "foreign", "cut", "missing", "no record", "cut record", "version", "no shards", "no site",
         "other site", "width", "dtype"],
)  # fmt: skip
def test_damage_of_any_kind_is_one_error(copied, damage, said):
    damage(copied)
    with pytest.raises(FileFormatError, match=said) as caught:
        store = ActivationStore(copied)
        batches(store, 64, sites=store.sites)
    assert "\n" not in str(caught.value)


def test_a_shard_that_goes_missing_later_is_the_same_error(copied):
    store = ActivationStore(copied)
    (copied / "shard-00000.safetensors").unlink()
    with pytest.raises(FileFormatError, match="There is no shard"):
        batches(store, 64)


# ahead


def test_no_more_is_read_ahead_than_asked_for_and_in_order():
    read, threads = [], set()

    def note(item):
        read.append(item)
        threads.add(threading.current_thread())
        return -item

    found = read_ahead(note, iter(range(1, 100)), most=3)
    for item in range(1, 20):
        assert next(found) == -item
        time.sleep(0.002)
        assert read == list(range(1, len(read) + 1))
        assert len(read) <= item + 3
    found.close()
    assert threads == {*threads} - {threading.main_thread()}
    (thread,) = threads
    thread.join(5)
    assert not thread.is_alive()
    assert list(read_ahead(str, range(5), most=9)) == list("01234")


def test_reading_goes_on_while_the_last_item_is_worked_on():
    ready = threading.Event()

    def read(item):
        if item == 2:
            ready.set()
        return item

    found = read_ahead(read, range(5), most=2)
    next(found)
    assert ready.wait(5)


def test_what_reading_raises_is_raised_where_its_item_is_asked_for():
    def read(item):
        if item == 2:
            raise FileFormatError("the third is damaged")
        return item

    found = read_ahead(read, range(5), most=4)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(FileFormatError, match="the third"):
        next(found)


# training


COMMON = {"features": 32, "batch": 100, "tokens": 4000, "k": 4, "lr": 8e-3, "log_every": 10}
SAE = SAEConfig(activation="topk", **COMMON)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("config", [SAE, CLTConfig(activation="topk", **COMMON)], ids=lambda c: c.kind)
def test_what_is_trained_on_a_store_explains_the_model(model, stores, config):
    trained = train(None, stores["int8"], config, progress=False)
    provenance = trained.provenance
    assert (provenance.model, provenance.fingerprint) == (model.name, model.fingerprint())
    assert (provenance.corpus, provenance.config["context"]) == ("rows of tokens", CONTEXT)
    trained.check_fits(model)
    untrained = Trainer(StoreSource(stores["int8"], model, config), [config]).finish()[0]
    held_out = rows_of(60, seed=1)
    assert evaluate(model, trained, held_out).fvu < 0.6 * evaluate(model, untrained, held_out).fvu


def test_trained_alone_or_with_others_and_with_the_model_or_without_it_is_the_same(model, stores):
    others = [SAEConfig(activation="topk", **{**COMMON, "k": k, "tokens": 1000}) for k in (4, 8, 16)]
    together = train(model, stores["float32"], others, progress=False)
    for config, dictionaries in zip(others, together, strict=True):
        assert same_weights(train(None, stores["float32"], config, progress=False), dictionaries)


def test_a_run_on_a_store_is_resumed_to_the_bit(stores, tmp_path):
    settings = {**COMMON, "batch": 400, "tokens": 9600}  # of which 16 batches are an epoch
    config = SAEConfig(activation="jumprelu", checkpoint_every=5, **settings)
    unbroken = train(None, stores["int8"], config, progress=False, out=tmp_path / "a")
    as_there = as_stored(config, stores["int8"])
    Trainer(StoreSource(stores["int8"], None, as_there), [as_there], out=tmp_path / "b").run(until=18, progress=False)
    resumed = train(None, stores["int8"], config, progress=False, out=tmp_path / "b", resume=True)
    assert same_weights(unbroken, resumed)
    with pytest.raises(InputError, match="is not the store that this run began with"):
        train(None, stores["float32"], config, progress=False, out=tmp_path / "b", resume=True)


def test_metrics_say_which_share_of_the_time_a_run_waited_for_its_data(stores, tmp_path, monkeypatch):
    train(None, stores["int8"], SAE, progress=False, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["data_wait"] < 1 for line in lines)

    clock = iter([0.0, *(1.0, 3.0), *(4.0, 5.0), 10.0, *(11.0, 11.5), 14.0])
    monkeypatch.setattr("transcoders.training.metrics.perf_counter", lambda: next(clock))
    wait, items = Wait(), iter("abc")
    assert wait.next(items) + wait.next(items) == "ab"
    assert wait.share() == 0.3
    assert wait.next(items) == "c"
    assert wait.share() == 0.125


def test_a_damaged_shard_ends_training_with_its_checkpoint_left(stores, copied, tmp_path):
    flipped(copied)
    config = SAEConfig(activation="topk", checkpoint_every=5, **COMMON)
    with pytest.raises(FileFormatError, match="shard-00001.* is not the shard that was written"):
        train(None, ActivationStore(copied), config, progress=False, out=tmp_path / "out")


def test_what_a_store_cannot_train_is_refused(model, stores, tmp_path):
    few = write(model, tmp_path, ROWS[:20], sites=["mlp_in"])
    assert few is not None
    with pytest.raises(InputError, match=r"lacks the activations at 0\.resid_post, 1\.resid_post; it has 0\.mlp_in, 1"):
        train(None, few, SAE, progress=False)
    with pytest.raises(InputError, match=r"was written with bos=False; got bos=True"):
        train(None, stores["int8"], replace(SAE, bos=True), progress=False)
    with pytest.raises(InputError, match=r"was written with context=17; got context=64"):
        train(None, stores["int8"], replace(SAE, context=64), progress=False)
    other = random_model(n_layers=2, d_model=D_MODEL, n_heads=2, d_vocab=30, context=32, seed=9)
    with pytest.raises(DictionaryError, match="Give the model that the store was written with"):
        train(other, stores["int8"], SAE, progress=False)


# the command line


def test_a_store_is_written_and_trained_on_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"When Mary and John went to store {i}, John ran." for i in range(99)))
    command = ["activations", "pocket", "--corpus", "text.txt", "--out", "acts", "--site", "resid_post"]
    command += ["--context", "16", "--dtype", "int8", "--tokens", "600"]
    main(command)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Activations: acts, 600 tokens at 4 sites, ")
    assert said[-1] == "Next:  circuitsae train pocket --corpus acts --kind sae --site resid_post --out FOLDER"
    arguments = [*said[-1].split()[2:-1], "saes", "--features", "16", "--tokens", "256", "--batch", "128"]
    main([*arguments, "--activation", "topk", "--k", "4"])
    assert "Next:  circuitsae evaluate pocket saes --corpus TEXT" in capsys.readouterr().out
    assert load_dictionaries("saes").provenance.config["context"] == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--site", "resid_post", "--job", "8"], "--job '8' names no share; write it like 2/8"),
        ([], "No site was named; give --site resid_post"),
        (["--site", "residual"], "Cannot read site 'residual'; expected LAYER.KIND"),
        (["--site", "1.residual"], "Cannot read site '1.residual'"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_two(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["activations", "pocket", "--out", str(tmp_path / "acts"), *options])
    assert caught.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "acts").exists()

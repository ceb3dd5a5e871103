"""Batches of a store: each token once in an epoch, in an order that can be gone on with, and damage is one error."""

import json
import threading
import time
from itertools import islice

import pytest
import torch

from tests.small_stores import (
    BLOCK,
    SITES,
    everything,
    in_order,
    small_model,
)
from transcoders import (
    ActivationStore,
)
from transcoders.data import StoreStream
from transcoders.data.ahead import read_ahead
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.sites import Site

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


def test_a_store_of_another_model_is_refused(stores, store_model):
    stores["int8"].require_model(store_model)
    other = small_model(seed=9)
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


def read_all(folder):
    store = ActivationStore(folder)
    batches(store, 64, sites=store.sites)


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
def test_damage_of_any_kind_is_one_error(copied_store, damage, said):
    damage(copied_store)
    with pytest.raises(FileFormatError, match=said) as caught:
        read_all(copied_store)
    assert "\n" not in str(caught.value)


def test_a_shard_that_goes_missing_later_is_the_same_error(copied_store):
    store = ActivationStore(copied_store)
    (copied_store / "shard-00000.safetensors").unlink()
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

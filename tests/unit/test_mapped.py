"""Decoders that stay in their file: the same numbers as in memory, and little memory."""

import subprocess
import sys

import pytest
import torch

import circuitsae as cs
from transcoders import load_dictionaries, random_dictionaries, save_dictionaries
from transcoders.dictionaries import DictionarySet, MappedDictionaries
from transcoders.errors import DictionaryError, FileFormatError
from transcoders.loading import random_model

CASES = [
    ("native", {"kind": "plt", "skip": True}),
    ("native", {"kind": "clt", "skip": True}),
    ("native", {"kind": "clt", "activation": "topk"}),
    ("native", {"kind": "sae", "centred": True}),
    ("circuit-tracer", {"kind": "plt", "skip": True, "activation": "jumprelu"}),
    ("circuit-tracer", {"kind": "clt", "activation": "jumprelu"}),
]


def build(**case):
    return random_dictionaries(**case, n_layers=12, d_model=8, features=16, k=5, seed=7).requires_grad_(False)


def both(folder, **options):
    return tuple(load_dictionaries(folder, decoders=place, **options) for place in ("memory", "mapped"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_everything_is_as_in_memory(tmp_path, name, case, storage, dtype):
    save_dictionaries(build(**case), tmp_path, format=name, storage_dtype=storage)
    memory, mapped = both(tmp_path, dtype=dtype)
    assert isinstance(mapped, MappedDictionaries)
    assert isinstance(mapped, DictionarySet)
    assert (mapped.kind, mapped.reads, mapped.writes) == (memory.kind, memory.reads, memory.writes)
    reads = torch.randn(12, 6, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    features = memory.encode(reads)
    assert torch.equal(mapped.encode(reads).index, features.index)
    torch.testing.assert_close(mapped.reconstruct(features, reads), memory.reconstruct(features, reads))
    feature = torch.tensor([3, 0, 3, 15])
    for layer in range(12):
        a = torch.randn(2, 3, 16, dtype=dtype).relu()
        a[..., 5] = 0
        torch.testing.assert_close(mapped.decode_layer(layer, a), memory.decode_layer(layer, a))
        assert torch.equal(mapped.encoder_rows(layer, feature), memory.encoder_rows(layer, feature))
        assert torch.equal(mapped.encoder_biases(layer, feature), memory.encoder_biases(layer, feature))
        for write_layer in memory.write_layers(layer):
            rows = mapped.decoder_rows(layer, feature, write_layer)
            assert torch.equal(rows, memory.decoder_rows(layer, feature, write_layer))
            assert rows.dtype == dtype


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_the_graph_is_as_in_memory(tmp_path, kind):
    save_dictionaries(random_dictionaries(kind, features=24, skip=True, seed=3), tmp_path)
    tokens = torch.tensor([0, 5, 9, 2])
    memory, mapped = (
        cs.attribute(
            cs.ReplacementModel(
                random_model(dtype=torch.float64), cs.load_dictionaries(tmp_path, dtype=torch.float64, decoders=place)
            ),
            tokens,
        )
        for place in ("memory", "mapped")
    )
    assert [node.id for node in mapped.nodes] == [node.id for node in memory.nodes]
    assert abs(mapped.weights - memory.weights).max() <= 1e-12


def test_slices_smaller_than_the_decoder_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr("transcoders.dictionaries.mapped._SLICE_BYTES", 100)
    save_dictionaries(build(kind="clt"), tmp_path)
    memory, mapped = both(tmp_path)
    a = torch.rand(3, 16)
    torch.testing.assert_close(mapped.decode_layer(1, a), memory.decode_layer(1, a))


def test_precision_can_be_changed(tmp_path):
    save_dictionaries(build(kind="clt"), tmp_path)
    mapped = load_dictionaries(tmp_path, decoders="mapped").to(torch.float64)
    every = torch.arange(16)
    expected = build(kind="clt").decoder_rows(2, every, 5).double()
    assert torch.equal(mapped.decoder_rows(2, every, 5), expected)


def test_what_cannot_be_done_says_so(tmp_path):
    save_dictionaries(build(kind="clt"), tmp_path / "clt")
    mapped = load_dictionaries(tmp_path / "clt", decoders="mapped")
    for name in ("native", "circuit-tracer"):
        with pytest.raises(DictionaryError, match="mapped.*load them with decoders='memory'"):
            save_dictionaries(mapped, tmp_path / "again", format=name)
    with pytest.raises(DictionaryError, match="write at layers 3 to 11; asked for 2"):
        mapped.decoder_rows(3, torch.tensor([0]), 2)
    (tmp_path / "clt" / "weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        load_dictionaries(tmp_path / "clt", decoders="mapped")


GROWTH = """
import sys, torch
from transcoders import load_dictionaries

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024

kept = []
for place in ("mapped", "memory"):
    before = held()
    dictionaries = load_dictionaries(sys.argv[1], decoders=place, dtype=torch.float64)
    for layer, write_layer in ((0, 0), (0, 1), (1, 1)):
        dictionaries.decoder_rows(layer, torch.arange(0, 8192, 512), write_layer)
    print(held() - before)
    kept.append(dictionaries)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_stays_small(tmp_path):
    """Decoders of 113 MB in the file, 226 MB in double precision; 16 rows of each are read.

    In a process of its own: this one holds memory that other tests have freed.
    """
    large = random_dictionaries("clt", n_layers=2, d_model=1152, features=8192)
    save_dictionaries(large, tmp_path)
    encoders_mb, decoders_mb = (sum(W.numel() for W in weights) * 8 / 2**20 for weights in (large.W_enc, large.W_dec))
    del large
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    mapped, memory = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert memory > encoders_mb + 0.95 * decoders_mb
    assert mapped < encoders_mb + 0.05 * decoders_mb

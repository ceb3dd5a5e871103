"""A precision may be named, wherever one is taken."""

import pytest
import torch

import circuitsae as cs
import transcoders
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.precision import PRECISIONS, all_finite, as_dtype
from transcoders.random_models import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionaries")
    transcoders.save_dictionaries(random_dictionaries("plt"), path)
    return path


@pytest.fixture
def takers(folder, tmp_path):
    """Whatever takes a precision, as a function from it to that of the result."""

    def stored(precision):
        transcoders.save_dictionaries(random_dictionaries("plt"), tmp_path, storage_dtype=precision)
        raw = transcoders.formats.files.read_tensors(tmp_path / "weights.safetensors")[0]
        return next(tensor.dtype for name, tensor in raw.items() if name.endswith("W_dec"))

    return {
        "load_model": lambda precision: cs.load_model("pocket", dtype=precision).dtype,
        "transcoders.load_model": lambda precision: transcoders.load_model(cs.pocket.MODEL_DIR, dtype=precision).dtype,
        "load_dictionaries": lambda precision: cs.load_dictionaries(folder, dtype=precision).decoder_bias(0).dtype,
        "random_dictionaries": lambda precision: random_dictionaries("clt", dtype=precision).decoder_bias(0).dtype,
        "random_model": lambda precision: random_model("gpt2", dtype=precision).dtype,
        "to": lambda precision: random_model("gpt2").to(precision).dtype,
        "save_dictionaries": stored,
    }


TAKERS = [
    "load_model",
    "transcoders.load_model",
    "load_dictionaries",
    "random_dictionaries",
    "random_model",
    "to",
    "save_dictionaries",
]


@pytest.mark.parametrize("taker", TAKERS)
def test_a_precision_may_be_named(takers, taker):
    for precision in ("bfloat16", torch.bfloat16):
        assert takers[taker](precision) == torch.bfloat16


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("wrong", ["bfloat17", torch.int8])
def test_another_name_is_refused_with_the_choices(takers, taker, wrong):
    with pytest.raises(
        InputError, match=r"no precision '(bfloat17|int8)' .* 'float32', 'float64', 'bfloat16' or 'float16'"
    ):
        takers[taker](wrong)


def test_every_precision_has_its_value():
    assert {as_dtype(name) for name in PRECISIONS} == {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def test_dictionaries_that_two_models_share_keep_their_own_precision():
    dictionaries = random_dictionaries("plt", n_layers=2, d_model=16, features=8)
    exact, usual = (
        ReplacementModel(random_model("gpt2", n_layers=2, d_model=16, dtype=dtype), dictionaries)
        for dtype in (torch.float64, torch.float32)
    )
    assert usual.dictionaries is dictionaries
    assert exact.dictionaries.decoder_bias(0).dtype is torch.float64
    tokens = torch.tensor([0, 1, 2])
    assert exact.trace(tokens).errors.dtype is torch.float64
    assert usual.trace(tokens).errors.dtype is torch.float32


def test_whether_all_is_finite():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        assert all_finite(torch.arange(6).to(dtype).view(2, 3))
        assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.zeros(3, 4)
        x[2, 1] = bad
        assert not all_finite(x)

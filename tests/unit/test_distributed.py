"""Two processes train what one does: to rounding, in three ways of sharing the work."""

from dataclasses import replace

import numpy as np
import pytest

from tests.distributed_cases import CASES, trained
from tests.ranks import on_ranks
from transcoders.training.distributed import ALONE

WAYS = [(how, name) for how in ("data", "layers", "features") for name in CASES if (how, name[:3]) != ("layers", "clt")]


@pytest.fixture(scope="module")
def alone():
    return dict(zip(CASES, trained(ALONE, list(CASES.values())), strict=True))


@pytest.fixture(scope="module")
def together():
    first, second = on_ranks(trained, [replace(CASES[name], parallel=how) for how, name in WAYS])
    return dict(zip(WAYS, zip(first, second, strict=True), strict=True))


def close(found, expected, name):
    scale = max(1e-3, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("how", "name"), WAYS, ids=lambda x: x)
def test_two_ranks_come_to_what_a_single_process_does(alone, together, how, name):
    expected, (first, second) = alone[name], together[how, name]
    assert first["tensors"].keys() == expected["tensors"].keys()
    assert not second["tensors"]
    for key, tensor in expected["tensors"].items():
        close(first["tensors"][key], tensor, key)
    for each in (first, second):
        assert each["record"]["sparse"] == expected["record"]["sparse"]
        assert each["record"]["controller"] == pytest.approx(expected["record"]["controller"], rel=1e-5)
        for key, value in expected["metrics"].items():
            assert each["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        for key, tensor in expected["dictionaries"].items():
            close(each["dictionaries"][key], tensor, key)

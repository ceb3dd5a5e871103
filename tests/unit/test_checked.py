"""Checks that are made once for all closures of a name: each closure keeps its own body, and its own hints."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests import checked


def scaled(by: float, shape: str):
    @jaxtyped(typechecker=checked.checked)
    def scale(x: Float[Tensor, shape], *, turned: bool = False) -> Float[Tensor, "a b"]:
        return (x * by).T if turned else x * by

    return scale


def test_closures_of_one_name_share_a_check_and_nothing_else():
    one = scaled(2, "a b")
    before = len(checked._CHECKED)
    other = scaled(3, "a b")
    assert len(checked._CHECKED) == before
    for scale, by in ((one, 2), (other, 3), (scaled(5, "a b"), 5)):
        assert float(scale(torch.ones(2, 4)).sum()) == 8 * by
        for wrong in (torch.ones(2), torch.ones(2, 4, dtype=torch.int64)):
            with pytest.raises(TypeCheckError, match="parameters"):
                scale(wrong)
        with pytest.raises(TypeCheckError, match="return value"):
            scale(torch.ones(2, 4), turned=True)


def test_closures_of_other_hints_are_checked_by_these():
    wide, narrow = scaled(1, "a 4"), scaled(1, "a 2")
    wide(torch.ones(3, 4))
    narrow(torch.ones(3, 2))
    for scale, wrong in ((wide, 2), (narrow, 4)):
        with pytest.raises(TypeCheckError):
            scale(torch.ones(3, wrong))


def test_the_packages_are_checked():
    from transcoders.loading import random_model

    with pytest.raises(TypeCheckError):
        random_model("gpt2", n_layers="two")  # pyright: ignore[reportArgumentType]

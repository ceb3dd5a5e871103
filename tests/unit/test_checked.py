"""Checks that are made once for all closures of a name: each closure keeps its own body, and its own hints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from tests import checked

Square = Float[Tensor, "n n"]


def scaled(by: float, shape: str):
    @checked.checked
    def scale(x: Float[Tensor, shape], *, turned: bool = False) -> Float[Tensor, "a b"]:
        return (x * by).T if turned else x * by

    return scale


def test_closures_of_one_name_share_a_check_and_nothing_else():
    one = scaled(2, "a b")
    one(torch.ones(2, 4))
    before = len(checked._CHECKS)
    other = scaled(3, "a b")
    for scale, by in ((one, 2), (other, 3), (scaled(5, "a b"), 5)):
        assert float(scale(torch.ones(2, 4)).sum()) == 8 * by
        for wrong in (torch.ones(2), torch.ones(2, 4, dtype=torch.int64)):
            with pytest.raises(TypeCheckError, match="parameter x"):
                scale(wrong)
        with pytest.raises(TypeCheckError, match="return_value"):
            scale(torch.ones(2, 4), turned=True)
    assert len(checked._CHECKS) == before


def test_closures_of_other_hints_are_checked_by_these():
    wide, narrow = scaled(1, "a 4"), scaled(1, "a 2")
    wide(torch.ones(3, 4))
    narrow(torch.ones(3, 2))
    for scale, wrong in ((wide, 2), (narrow, 4)):
        with pytest.raises(TypeCheckError):
            scale(torch.ones(3, wrong))


def test_shapes_mean_the_same_within_a_call_and_nothing_after_it():
    @checked.checked
    def product(a: Float[Tensor, "n m"], *others: Float[Tensor, "m _"], **how: "Float[Tensor, 'n'] | None") -> Square:
        return a @ others[0]

    assert product(torch.ones(2, 3), torch.ones(3, 2)).shape == (2, 2)
    assert product(torch.ones(4, 5), torch.ones(5, 4), scale=torch.ones(4), none=None).shape == (4, 4)
    for wrong, how in (((2, 3), (2, 2)), {}), (((2, 3), (3, 2)), {"scale": torch.ones(3)}), (((2, 3), (3, 3)), {}):
        with pytest.raises(TypeCheckError):
            product(*map(torch.ones, wrong), **how)
    with pytest.raises(TypeError, match=r"product\(\) missing 1 required positional argument"):
        product()


def test_generators_methods_and_dataclasses_are_checked():
    @checked.checked
    @dataclass
    class Held:
        value: Float[Tensor, "n"]

        @checked.checked
        def parts(self, of: Callable[[Tensor], Tensor], number: int = 0, /) -> Iterator[Float[Tensor, "n"]]:
            yield of(self.value) + number

        @checked.checked
        def again(self) -> "Held":
            return self if self.value.sum() else self.value  # pyright: ignore[reportReturnType]

    held = Held(torch.ones(2))
    assert [part.tolist() for part in held.parts(torch.neg, 1)] == [[0.0, 0.0]]
    assert held.again() is held
    with pytest.raises(TypeCheckError):
        Held(torch.ones(2, 2))
    with pytest.raises(TypeCheckError):
        held.parts(torch.neg, "one")  # pyright: ignore[reportArgumentType]


def test_a_plain_class_that_is_returned_is_told_by_its_type():
    def made(found: object, hint: object):
        def plain(self):
            return found

        plain.__annotations__ = {"return": hint}
        plain.__qualname__ = f"plain{hint}"
        return checked.checked(plain)(None)

    assert [made(found, hint) for found, hint in ((3, int), (True, int), ("a", str), (None, None))] == [
        3,
        True,
        "a",
        None,
    ]
    for found, hint in ((3, str), (3, None), (None, int), (3, bool)):
        with pytest.raises(TypeCheckError, match="return_value"):
            made(found, hint)


def test_what_runs_as_users_run_it_is_not_checked():
    scale = scaled(2, "a b")
    with checked.as_users_run():
        assert scale(torch.ones(3)).shape == (3,)
    with pytest.raises(TypeCheckError):
        scale(torch.ones(3))


def test_the_packages_are_checked():
    from circuitsae.interventions.passes import goes_on
    from transcoders.loading import random_model

    with pytest.raises(TypeCheckError):
        random_model("gpt2", n_layers="two")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeCheckError):
        goes_on(None, 1)  # pyright: ignore[reportArgumentType]

"""What circuits lack and could do without, as sets, on functions of sets that are known."""

from itertools import combinations

import numpy as np
import pytest

from circuitsae.validation.subsets import compare, halves, largest_changes, shrink

PARTS: tuple[str, ...] = ("a", "b", "c", "d")


def _counting(f):
    """A function of sets as these algorithms take it, and the sets that it was asked about."""
    asked: list[frozenset[str]] = []

    def without(sets):
        asked.extend(sets)
        return np.array([f(gone) for gone in sets])

    return without, asked


def test_draws_take_what_they_say():
    assert halves(PARTS, [[True, False, True, False], [False] * 4]) == [("a", "c"), ()]


def test_a_growing_set_takes_the_part_that_widens_the_gap_most():
    """The model has a backup for b: without b it does as before, and the circuit does not."""
    weight = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 0.0}

    def both(sets):
        circuit = [3.5 - sum(weight[part] for part in k) for k in sets]
        model = [value + (2.0 if "b" in k else 0.0) for value, k in zip(circuit, sets, strict=True)]
        return np.array([circuit, model]).T

    found = compare(both, [(), ("a",)], PARTS, greedy=2)
    assert [k.removed for k in found] == [(), ("a",), ("b",), ("b", "a")]
    assert [k.gap for k in found] == [0, 0, 2, 2]
    assert (found[2].circuit, found[2].model) == (1.5, 3.5)
    narrow = compare(both, [()], PARTS, greedy=9, tried=lambda rest: rest[-1:])
    assert narrow[-1].removed == ("d", "c", "b", "a")


def test_a_backup_shows_only_where_the_other_is_gone():
    """F = 1 where a or b is there, so that each matters only without the other; each set is measured once."""
    without, asked = _counting(lambda gone: float(not {"a", "b"} <= gone))
    contexts = [frozenset(), frozenset("b"), frozenset("a")]
    tests = [(v, k - {v}) for v in "abc" for k in contexts]
    assert largest_changes(without, tests) == {"a": (1.0, 1), "b": (1.0, 1), "c": (0.0, 0)}
    assert len(asked) == len(set(asked))


def _f(gone):
    """Parts add up, but c does harm and d is nothing without a."""
    left = set(PARTS) - gone
    return 0.5 * ("a" in left) + 0.3 * ("b" in left) - 0.2 * ("c" in left) + 0.2 * ({"a", "d"} <= left)


@pytest.mark.parametrize("candidates", [None, 1, 2])
def test_parts_leave_until_every_one_is_needed(candidates):
    without, _ = _counting(_f)
    found = shrink(without, PARTS, limit=0.21, candidates=candidates)
    assert found.steps[0] == ("c", pytest.approx(1.0), 4)
    assert [part for part, *_ in found.steps] == ["c", "d"]
    assert found.needed == pytest.approx({"a": 0.3, "b": 0.5})


def test_what_is_left_could_not_be_smaller_by_one_part_however_few_are_scored():
    generator = np.random.default_rng(0)
    table = {frozenset(k): generator.random() for n in range(5) for k in combinations(PARTS, n)}
    for candidates in (None, 1, 3):
        without, asked = _counting(lambda gone: table[gone])
        found = shrink(without, PARTS, limit=0.6, candidates=candidates)
        gone = frozenset(part for part, *_ in found.steps)
        assert all(abs(1 - f) <= 0.6 for _, f, _ in found.steps)
        for part in set(PARTS) - gone:
            assert found.needed[part] == table[gone | {part}]
            assert abs(1 - found.needed[part]) > 0.6
        assert sum(scored for *_, scored in found.steps) + len(found.needed) == len(asked)


def test_scoring_a_few_takes_few_runs():
    """64 parts that do nothing beside one that does everything: n²/2 circuits, or a few for each."""
    parts = tuple(range(65))
    counts = []
    for candidates in (None, 4):
        without, asked = _counting(lambda gone: float(0 not in gone))
        assert list(shrink(without, parts, limit=0.5, candidates=candidates).needed) == [0]
        counts.append(len(asked))
    assert counts == [65 * 66 // 2, 65 + 61 * 4 + 3 + 2 + 1]

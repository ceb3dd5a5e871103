"""Metrics against float64 loops over single examples, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from circuitsae.tasks import PatchPair, metric
from circuitsae.tasks.task import METRICS, MetricName
from transcoders.errors import InputError

VOCAB, POS = 11, 7


def _pair() -> PatchPair:
    generator = torch.Generator().manual_seed(1)
    return PatchPair(
        clean=torch.randint(VOCAB, (3, POS), generator=generator),
        corrupt=torch.randint(VOCAB, (3, POS), generator=generator),
        answers=torch.tensor([[4, -1, -1], [5, 6, 7], [0, 10, -1]]),
        wrong=torch.tensor([[3, 2], [1, -1], [8, 9]]),
        boundary=torch.tensor([[4, 3], [5, 1], [0, 9]]),
        roles={"END": torch.tensor([POS - 1] * 3), "copy": torch.tensor([4, 3, 5])},
        templates=("a", "a", "b"),
        index=torch.arange(3),
    )


def _logits(*alternatives: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(*alternatives, 3, POS, VOCAB, generator=generator, dtype=torch.float64)


def _probabilities(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def _oracle(name: str, logits: Tensor, pair: PatchPair, i: int, reference: Tensor) -> float:
    """One example, by hand."""
    table = logits.tolist()
    end, p = table[-1], _probabilities(table[-1])
    answers = [a for a in pair.answers[i].tolist() if a >= 0]
    wrong = [a for a in pair.wrong[i].tolist() if a >= 0]
    up, down = pair.boundary[i].tolist()
    tokens = [*pair.clean[i].tolist(), answers[0]]
    losses = [-math.log(_probabilities(table[t - 1])[tokens[t]]) for t in range(1, POS + 1)]
    copy = int(pair.roles["copy"][i])
    first, second = losses[: copy - 1], losses[copy - 1 :]
    q = _probabilities(reference[i].tolist())
    return {
        "logit_diff": sum(end[a] for a in answers) / len(answers) - sum(end[w] for w in wrong) / len(wrong),
        "prob_diff": sum(p[a] for a in answers) - sum(p[w] for w in wrong),
        "log_prob": math.log(sum(p[a] for a in answers)),
        "sharpness": p[up] - p[down],
        "accuracy": float(max(end[a] for a in answers) > max(end[w] for w in wrong)),
        "top1": float(end.index(max(end)) in answers),
        "kl": sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)),
        "first_copy_loss": sum(first) / len(first),
        "second_copy_loss": sum(second) / len(second),
    }[name]


@pytest.mark.parametrize("name", METRICS)
def test_agrees_with_single_examples_in_any_number_of_alternatives(name: MetricName) -> None:
    pair, reference = _pair(), _logits()[:, -1] / 2
    score = metric(name, pair, reference=reference)
    for shape in ((), (4,), (2, 3)):
        logits = _logits(*shape)
        found = score(logits)
        assert found.shape == (*shape, 3)
        flat = logits.reshape(-1, 3, POS, VOCAB)
        expected = [[_oracle(name, row[i], pair, i, reference) for i in range(3)] for row in flat]
        torch.testing.assert_close(found.reshape(-1, 3), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", METRICS)
def test_metric_of_some_examples_is_part_of_the_whole(name: MetricName) -> None:
    logits, rows = _logits(), torch.tensor([2, 0])
    score = metric(name, _pair(), reference=_logits() / 2)
    assert torch.equal(score.take(rows)(logits[rows]), score(logits)[rows])


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("accuracy", "top1")])
def test_gradients_are_those_of_finite_differences(name: MetricName) -> None:
    score = metric(name, _pair(), reference=_logits() / 2)
    assert torch.autograd.gradcheck(score, _logits().requires_grad_())


def test_kl_vanishes_with_its_gradient_at_the_reference() -> None:
    logits = _logits().requires_grad_()
    found = metric("kl", _pair(), reference=logits.detach())(logits)
    found.sum().backward()
    assert found.abs().max() < 1e-12
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_missing_parts_are_named() -> None:
    pair = _pair()
    bare = pair.take([0])
    bare.wrong[:] = -1
    bare.boundary[:] = -1
    del bare.roles["copy"]
    cases = {
        "logit_dif": "did you mean 'logit_diff'",
        "kl": "give reference=",
        "accuracy": "takes wrong answers in every example",
        "sharpness": "takes a boundary",
        "second_copy_loss": "takes a role 'copy'",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            metric(name, bare)

"""Whether a head copies the names that it looks at: its copy score (Wang et al. 2022, section 3.1)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitsae.components.network import Network
from circuitsae.tasks import Task
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

TOP = 5
NAMES = 60
"""At most so many names are tried on every head."""
COPIED: dict[str, Mapping[str, str]] = {
    "ioi": {"IO": "answers", "S1": "wrong", "S2": "wrong"},
    "induction": {"B1": "answers"},
}
"""By task: where the names stand, and which of an example's answers says the same name."""
_ROWS = 512


@torch.no_grad()
def copy_scores(
    model: LanguageModel, task: Task, copied: Mapping[str, str] | None = None, *, limit: int = NAMES
) -> Float[Tensor, "2 head"]:
    """The share of names that each head puts among the top 5 tokens; first with its OV circuit, then with −OV.

    `logits = W_U norm_f(± norm_l(x) W_V W_O)`: x is the stream after the first block at a name of the task, norm_l the
    norm that the head reads through, norm_f the final one. Heads in the model's order (Wang et al. 2022, section 3.1).
    Raises `InputError` for a task of which it is not known where its names stand.
    """
    where = COPIED.get(task.name) if copied is None else copied
    if where is None:
        raise InputError(f"The task {task.name!r} copies no names that are known; give `copied`, of {list(COPIED)}.")
    network = Network.of(model)
    stream, names = _names(model, task, where, limit)
    target = names.repeat_interleave(network.graph.n_heads)
    found = []
    for layer in range(network.graph.n_layers):
        written = network.norm(layer, "ln1_post", _written(network, layer, stream)).flatten(0, 1)
        both = [_is_top(network, sign * written, target) for sign in (1, -1)]
        found.append(torch.stack(both).view(2, len(names), -1).double().mean(1))
    return torch.cat(found, 1).cpu()


def _names(
    model: LanguageModel, task: Task, where: Mapping[str, str], limit: int
) -> tuple[Float[Tensor, "name d_model"], Int[Tensor, "name"]]:
    """The stream after the first block at the names, and the token that says each."""
    site, streams, tokens = Site(0, "resid_post"), [], []
    count = -(-limit // len(where))
    for pair in task.take(slice(count)).tokens(model):
        stream = model.activations(pair.clean, [site])[site]
        for role, answers in where.items():
            at, named = pair.roles[role], getattr(pair, answers)[:, 0]
            rows = ((at >= 0) & (named >= 0)).nonzero()[:, 0]
            streams.append(stream[rows, at[rows]])
            tokens.append(named[rows])
    return torch.cat(streams)[:limit], torch.cat(tokens)[:limit]


def _written(network: Network, layer: int, x: Float[Tensor, "name d_model"]) -> Float[Tensor, "name head d_model"]:
    """What each head writes where all of its attention is on one of these vectors."""
    values = network.project(layer, "v", x[None, :, None])
    groups = network.graph.n_heads // values.shape[2]
    return network.results(layer, values.repeat_interleave(groups, dim=2))[0]


def _is_top(network: Network, written: Float[Tensor, "row d_model"], target: Int[Tensor, "row"]) -> Tensor:
    found = []
    for rows, token in zip(written.split(_ROWS), target.split(_ROWS), strict=True):
        logits = network.logits(rows[None])[0]
        # Equal logits rank before it: a head that writes nothing copies none.
        found.append((logits >= logits.gather(1, token[:, None])).sum(1) <= TOP)
    return torch.cat(found)

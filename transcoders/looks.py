"""How attention heads look near one run: what goes into their softmax, and how it changes with queries and keys.

Whatever a model does between `W_Q`, `W_K` and the softmax is watched while its own module runs, and differentiated:
rotary positions, norms of queries and keys, factors, soft caps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm"}
"""Names of torch's functions by which models multiply queries and keys."""


class Look(NamedTuple):
    """How heads look near one run: `score = slope (query · key)` to first order, and queries and keys of theirs."""

    query: Float[Tensor, "head pos d_head"]
    key: Float[Tensor, "head pos d_head"]
    """One for each head, where they share keys."""
    slope: Float[Tensor, "head pos pos"]
    """Of what the softmax takes by their product: 1/√d_head, the derivative of a soft cap, 0 where nothing is seen."""
    of_query: Float[Tensor, "head pos d_head d_head"] | None
    """How `query` changes with what W_Q gives, or a norm of all heads together (the last dimension): rotary positions,
    norms; None: as that does.
    """
    of_key: Float[Tensor, "kv pos d_head d_head"] | None
    out: Float[Tensor, "pos d_model"]
    """What attention writes."""

    @property
    def n_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self if part is not None)

    @classmethod
    def of(
        cls, seen: "WatchedScores", leaves: Mapping[str, Tensor], counts: Sequence[int], out: Tensor, home: torch.device
    ) -> "Look":
        """Of a run of attention whose queries and keys were `leaves`, with `counts` of heads, and which wrote `out`.

        Raises `RuntimeError` where no product of both goes into a softmax.
        """
        if not seen.scores or seen.product is None or len(leaves) < 2:
            raise RuntimeError("no product of queries and keys is seen to go into its softmax")
        n = seen.product.shape[-1]
        (slope,) = torch.autograd.grad(seen.scores[0][..., :n].sum(), seen.product, retain_graph=True)
        slope, sides, maps = slope * seen.factor, [], []
        for kind, side, count in zip("qk", seen.sides, counts, strict=True):
            jacobian = _jacobian(side, leaves[kind], count)
            factor = jacobian[0, 0, 0, 0].clone()
            same = torch.equal(jacobian, (factor * torch.eye(side.shape[-1]).to(jacobian)).expand_as(jacobian))
            sides.append(side.detach().reshape(counts[0], n, -1) / (factor if same else 1))
            slope = slope * (factor if same else 1)
            maps.append(None if same else jacobian)
        parts = (*sides, slope.reshape(counts[0], n, n))
        like = {"device": home, "dtype": torch.promote_types(out.dtype, torch.float32)}
        query, key, slope = (part.detach().to(**like) for part in parts)
        of_query, of_key = (None if J is None else J.detach().to(**like) for J in maps)
        return cls(query, key, slope, of_query, of_key, out)


def _jacobian(side: Tensor, leaf: Tensor, count: int) -> Float[Tensor, "head pos d_head d_head"]:
    """How queries or keys, as their product takes them, change with what W_Q or W_K gives, at each position alone."""
    n, d_head = side.shape[-2:]
    each = side.reshape(-1, n, d_head)
    first = torch.zeros(d_head, count, len(each) // count, n, d_head, dtype=side.dtype, device=side.device)
    first[:, :, 0] = torch.eye(d_head, dtype=side.dtype, device=side.device)[:, None, None]
    found = torch.autograd.grad(each, leaf, first.flatten(1, 2), retain_graph=True, is_grads_batched=True)[0]
    return found.reshape(d_head, n, count, -1).permute(2, 1, 0, 3).contiguous()


class WatchedScores(TorchFunctionMode):
    """While it lasts, what the first softmax is given, or what is noted before, and the last product before that of two
    that are differentiated: that of queries and keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []
        self.product: Tensor | None = None
        self.sides: tuple[Tensor, Tensor]
        self.factor = 1.0
        """By which the product is multiplied within its own operation."""

    def note_scores(self, scores: Tensor) -> None:
        self.scores.append(scores)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        out = func(*args, **named)
        if name == "softmax":
            self.note_scores(args[0] if args else named["input"])
        elif not self.scores and name in _PRODUCTS:
            tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
            left, right = tensors[-2:]
            if left.requires_grad and right.requires_grad:
                self.product, self.sides, self.factor = out, (left, right.mT), named.get("alpha", 1.0)
        return out


class WatchedSoftmax(TorchFunctionMode):
    """While it lasts, what every softmax is given is put into a list."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "softmax":
            self._found.append(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))

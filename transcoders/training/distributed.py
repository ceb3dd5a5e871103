"""Processes that train together, by torch.distributed: what they say to each other.

    torchrun --nproc-per-node 2 -m circuitsae train …

gloo carries what lies on processors, NCCL what lies on GPUs. A single process is a world of one, whose sums are its own
values, so that nothing else in `training` asks how many there are.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Shaped
from torch import Tensor

from transcoders.devices import AUTO
from transcoders.errors import InputError, LostRankError

logger = logging.getLogger(__name__)

_TIMEOUT = timedelta(minutes=30)
"""Longest wait for a rank that lives: it may be reading the corpus, or writing a checkpoint. One that dies is noticed
at once by gloo, and by torchrun, which then ends the others."""
_TOGETHER = 2**18
"""Numbers up to which gradients travel in one message."""


@dataclass(frozen=True)
class World:
    """The ranks that share a run, of which this process is one. Every method must be called by all of them.

    Raises `LostRankError` where another rank does not answer any more.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and progress."""
        return self.rank == 0

    # values of all, on every rank

    def sum(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Over all ranks, without a gradient."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def count(self, n: int) -> int:
        """The sum of numbers."""
        return n if self.size == 1 else int(self.sum(torch.tensor(n)))

    def least(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        return self._reduced(x, dist.ReduceOp.MIN)

    def any(self, x: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        return x if self.size == 1 else self._reduced(x.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum, with the gradient of each rank's own x: every rank goes on to compute the same loss of it."""
        return x if self.size == 1 else _apply(_Total, x, self)

    def shared(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """x itself, which all ranks have alike and each uses for its own part: its gradient is the sum of theirs."""
        return x if self.size == 1 else _apply(_Shared, x, self)

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over all ranks in the place of the tensors; small ones travel together."""
        if self.size == 1:
            return
        small = [tensor for tensor in tensors if tensor.numel() <= _TOGETHER]
        for tensor in tensors:
            if tensor.numel() > _TOGETHER:
                tensor.copy_(self.sum(tensor)) if not tensor.is_contiguous() else self._all_reduce(tensor)
        if small:
            summed = self.sum(torch.cat([tensor.flatten() for tensor in small]))
            for tensor, part in zip(small, summed.split([tensor.numel() for tensor in small]), strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def gather(self, x: Shaped[Tensor, "..."], dim: int = 0) -> Shaped[Tensor, "..."]:
        """The tensors of all ranks side by side, in the order of ranks; they may differ in length along `dim`."""
        if self.size == 1:
            return x
        x = x.detach().movedim(dim, 0).contiguous()
        length = torch.tensor([len(x)], device=x.device)
        with self._heard():
            lengths = [torch.empty_like(length) for _ in range(self.size)]
            dist.all_gather(lengths, length)
            sizes = [int(n) for n in lengths]
            padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
            received = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(received, padded)
        return torch.cat([part[:n] for part, n in zip(received, sizes, strict=True)]).movedim(0, dim)

    @torch.no_grad()
    def gather_to_first(self, x: Tensor) -> list[Tensor] | None:
        """The tensors of all ranks, of one shape, in the memory of the first rank's processor; None on the others."""
        own = x.detach().cpu().contiguous()
        if self.size == 1:
            return [own]
        received = [torch.empty_like(own) for _ in range(self.size)] if self.first else None
        with self._heard():
            dist.gather(own, received, dst=0)
        return received

    def send_to_first(self, x: Tensor | None, like: Tensor, owner: int) -> Tensor | None:
        """A tensor that its owner alone has, of the shape and type of `like`, in the first rank's memory."""
        if owner == 0 or self.rank not in (0, owner):
            return x if self.first else None
        with self._heard():
            if self.first:
                received = torch.empty(like.shape, dtype=like.dtype)
                dist.recv(received, src=owner)
                return received
            assert x is not None
            dist.send(x.detach().cpu().contiguous(), dst=0)
        return None

    @torch.no_grad()
    def exchange(self, parts: Sequence[Tensor], like: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send the r-th part to rank r; returns what the r-th rank sent here, of the shape `like[r]`."""
        if self.size == 1:
            return list(parts)
        sizes = [torch.Size(shape).numel() for shape in like]
        received = parts[0].new_empty(sum(sizes))
        with self._heard():
            dist.all_to_all_single(
                received, torch.cat([part.flatten() for part in parts]), sizes, [part.numel() for part in parts]
            )
        return [flat.view(*shape) for flat, shape in zip(received.split(sizes), like, strict=True)]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Put the first rank's values in the place of all others'."""
        if self.size == 1:
            return
        with self._heard(), torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sum(torch.zeros(1))

    # how

    def _reduced(self, x: Tensor, by: Any) -> Tensor:
        if self.size == 1:
            return x
        return self._all_reduce(x.detach().clone(memory_format=torch.contiguous_format), by)

    def _all_reduce(self, x: Tensor, by: Any = dist.ReduceOp.SUM) -> Tensor:
        with self._heard():
            dist.all_reduce(x, op=by)
        return x

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed raises is one
            reason = str(error).partition("This is typically")[0].strip()
            raise LostRankError(
                f"Rank {self.rank} of {self.size} no longer hears the others ({reason:.160}); one of them stopped with "
                "an error that it printed, was killed, ran out of memory, or lost its network."
            ) from error


ALONE = World()


def join(device: torch.device) -> World:
    """The world that torchrun says this process belongs to, made where the caller has not; `ALONE` without torchrun."""
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if ranks_in_environment() == 1 or "MASTER_ADDR" not in os.environ:
            return ALONE
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    world = World(dist.get_rank(), dist.get_world_size())
    logger.info("rank %d of %d on %s", world.rank, world.size, device)
    return world


def leave() -> None:
    """Close what `join` opened; without torchrun nothing is to be closed."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_in_environment() -> int:
    """This process's number among those that torchrun started, before any of them has joined; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def ranks_in_environment() -> int:
    """How many processes torchrun started, on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_of_rank(device: str) -> str:
    """The device of this process: of several GPUs the one with torchrun's local number; any other as it is named.

    `"auto"` stays with the caller, but for several processes, which share GPUs only where there is one for each.
    Raises `InputError` where a GPU is named by its number and torchrun started more than one process here.
    """
    here = ranks_here()
    if device == AUTO and here > 1:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"
    if here == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise InputError(
            f"Each of torchrun's processes has a GPU of its own, so give the device 'cuda'; got {device!r}."
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def _apply(function: Callable[..., Any], x: Tensor, world: World) -> Tensor:
    result = function.apply(x, world)  # pyright: ignore[reportFunctionMemberAccess]
    assert isinstance(result, Tensor)
    return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        return world.sum(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(grad_outputs[0]), None

"""Processes as torchrun starts them, for tests: forked from one that has imported everything already."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from transcoders.errors import LostRankError
from transcoders.training.distributed import World, join, leave

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks", "transcoders.training.entry"])
_SECONDS = 120


def start_ranks(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[tuple[Any, Connection]]:
    """A process for each rank, which calls `function(world, *arguments)`, and what it is heard through."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_work, args=(rank, size, port, there, function, arguments), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
    return started


def on_ranks(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Any]:
    """What each rank returned; the first error that one of them raised is raised here."""
    results = [heard(*rank) for rank in start_ranks(function, *arguments, size=size)]
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, LostRankError)):
        raise error
    return results


def heard(process: Any, here: Connection) -> Any:
    """What a rank returned or raised; None where it was killed."""
    try:
        result = here.recv() if here.poll(_SECONDS) else TimeoutError(f"no word after {_SECONDS} s")
    except EOFError:
        result = None
    process.join(5)
    process.kill()
    return result


def _work(
    rank: int, size: int, port: int, there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        there.send(function(_world(), *arguments))
    except BaseException as error:
        there.send(error)
    finally:
        leave()


def _world() -> World:
    return join(torch.device("cpu"))

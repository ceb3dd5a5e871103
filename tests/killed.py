"""Trainings that are killed, each in a process of its own, forked from this one, which imports torch once for all.

    python -m tests.killed FOLDER disk --every 1 sae-topk      killed before each touch of the disk, one after the other
    python -m tests.killed FOLDER time --kills 10 sae-topk clt  one run, killed at ten random moments

Each is started again with `resume`, and must come to the weights and the metrics of a run that nobody disturbed. Exit
code 1, and lines on stderr, where one does not.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from transcoders import CLTConfig, SAEConfig, TrainConfig, TranscoderConfig, load_dictionaries
from transcoders.errors import InputError
from transcoders.training.batches import VectorSource
from transcoders.training.entry import train
from transcoders.training.run_folder import identity_of, was_started

COMMON: dict[str, Any] = {
    "features": 24, "batch": 32, "tokens": 32 * 7, "k": 3, "lr": 1e-2, "dead_after": 64, "log_every": 1,
    "checkpoint_every": 2, "keep_last": 2, "keep_best": True,
}  # fmt: skip
RUNS: dict[str, list[TrainConfig]] = {
    "sae-topk": [SAEConfig(activation="topk", k_aux=4, **COMMON)],
    "sae-jumprelu": [SAEConfig(activation="jumprelu", target_l0=4.0, **COMMON)],
    "sae-batchtopk": [SAEConfig(activation="batchtopk", k_start=2.0, **COMMON)],
    "sae-gated": [SAEConfig(activation="gated", **COMMON)],
    "sae-ema": [SAEConfig(activation="relu", penalty="p_anneal", ema=0.9, **COMMON)],
    "sae-resample": [SAEConfig(activation="jumprelu", remedy="resample", resample_every=2, **COMMON)],
    "plt-parts": [TranscoderConfig(activation="topk", skip=True, layers_at_once=1, **COMMON)],
    "clt": [CLTConfig(activation="jumprelu", target_l0=4.0, **COMMON)],
    "several": [CLTConfig(activation="batchtopk", **COMMON), TranscoderConfig(activation="gated", **COMMON)],
}
"""At a size that takes no time."""
LONG: dict[str, Any] = {"features": 1024, "k": 8, "tokens": 32 * 60, "checkpoint_every": 4}
WIDTH = 64
"""At a size of which writing takes some of the time."""


def data(configs: list[TrainConfig], width: int = 8) -> Any:
    reads, writes = (torch.randn(400, 3, width, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return reads if configs[0].kind == "sae" else (reads, writes)


def source_of(configs: list[TrainConfig], width: int = 8) -> VectorSource:
    given = data(configs, width)
    reads, writes = given if isinstance(given, tuple) else (given, None)
    return VectorSource(reads, writes, seed=configs[0].seed)


def run(configs: list[TrainConfig], out: Path, *, resume: bool, width: int = 8) -> None:
    train(None, data(configs, width), configs, out=out, resume=resume, progress=False)


def go_on(configs: list[TrainConfig], out: Path, width: int = 8) -> None:
    """As a user would: with `resume`, or without where it says that there is nothing to resume."""
    try:
        run(configs, out, resume=True, width=width)
    except InputError:
        try:
            started = was_started(out, identity_of(source_of(configs, width), configs))
        except InputError:  # by another run
            started = False
        if started:
            raise
        run(configs, out, resume=False, width=width)


def forked(work: Callable[[], object]) -> int:
    """The process that does it; 0 or 1 is its exit status."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before_touching(out: Path, number: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, killed before it changes anything below `out` for the `number`-th time."""
    left = number

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
            return
        if event == "open" and not (len(arguments) > 2 and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(arguments[0]).startswith(str(out)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        sys.addaudithook(audit)
        work()

    return killed


def figures(metrics: Path) -> list[dict[str, Any]]:
    """All but times, which differ."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "data_wait"} for line in lines]


def contents(configs: list[TrainConfig], out: Path) -> Iterator[tuple[str, Any]]:
    """All that a run comes to."""
    for metrics in sorted(out.rglob("metrics.jsonl")):
        folder = metrics.parent
        yield f"{folder.relative_to(out)} metrics", figures(metrics)
        dictionaries: Any = load_dictionaries(folder)
        for name, tensor in dictionaries.state_dict().items():
            yield f"{folder.relative_to(out)} {name}", tensor
    yield "files", sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.name != ".training.lock")


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        name
        for name in expected.keys() | found.keys()
        if not (
            torch.equal(expected[name], found[name])
            if isinstance(expected.get(name), torch.Tensor) and isinstance(found.get(name), torch.Tensor)
            else expected.get(name) == found.get(name)
        )
    ]


def unbroken(configs: list[TrainConfig], out: Path, width: int = 8) -> dict[str, Any]:
    if status := ended(forked(lambda: run(configs, out, resume=False, width=width))):
        raise SystemExit(f"an undisturbed run ended with {status}")
    return dict(contents(configs, out))


def kill_at_the_disk(name: str, folder: Path, every: int, first: int) -> tuple[int, list[str]]:
    """Runs that are killed before each `every`-th touch; how many, and what went wrong."""
    configs, bad, kills = RUNS[name], [], 0
    expected = unbroken(configs, folder / "unbroken")
    for number in range(first, 10_000, every):
        out = folder / f"{number}"
        start = killed_before_touching(out, number, lambda out=out: run(configs, out, resume=False))
        if (status := ended(forked(start))) != -signal.SIGKILL:
            return kills, bad + [f"{name}: run {number} ended with {status}"] * (status != 0)
        kills += 1
        status = ended(forked(lambda out=out: go_on(configs, out)))
        found = {} if status else dict(contents(configs, out))
        bad += [f"{name}, killed at touch {number}: {each}" for each in differences(expected, found)[:3]]
    return kills, bad


def kill_in_time(name: str, folder: Path, kills: int, seed: int) -> tuple[int, int, list[str]]:
    """One run, killed at random moments; how often, how often of these while it wrote, and what differs."""
    configs, generator = [replace(config, **LONG) for config in RUNS[name]], random.Random(seed)
    out, began = folder / "killed", time.monotonic()
    expected = unbroken(configs, folder / "unbroken", WIDTH)
    whole, killed, writing = time.monotonic() - began, 0, 0
    for _ in range(kills):
        pid = forked(lambda: go_on(configs, out, WIDTH))
        time.sleep(generator.uniform(0.02, 0.15) * whole)
        os.kill(pid, signal.SIGKILL)
        if (status := ended(pid)) not in (-signal.SIGKILL, 0):
            return killed, writing, [f"{name}: ended with {status} by itself"]
        killed += status != 0
        writing += any(out.rglob(".*.tmp")) or any(out.rglob(".*.whole"))
    if status := ended(forked(lambda: go_on(configs, out, WIDTH))):
        return killed, writing, [f"{name}: the last start ended with {status}"]
    return killed, writing, [f"{name}: {each}" for each in differences(expected, dict(contents(configs, out)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("how", choices=("disk", "time"))
    parser.add_argument("runs", nargs="+", choices=RUNS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    failed = False
    for name in given.runs:
        if given.how == "disk":
            kills, bad = kill_at_the_disk(name, given.folder / name, given.every, given.first)
            said = f"{kills} kills"
        else:
            kills, writing, bad = kill_in_time(name, given.folder / name, given.kills, given.seed)
            said = f"{kills} kills, {writing} of them while it wrote"
        print(f"{name}: {said}, {len(bad)} differences", flush=True)
        print("\n".join(bad), file=sys.stderr, end="")
        failed |= bool(bad)
    sys.exit(failed)


if __name__ == "__main__":
    main()

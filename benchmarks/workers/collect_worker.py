"""Collects feature cards of the pocket CLT over a number of tokens, and says what it took."""

import logging
import resource
import sys
import time

from measuring import answer, cpu_seconds

from circuitsae.features import CollectConfig, collect
from circuitsae.loading import load_dictionaries, load_model
from circuitsae.pocket.corpus import CONTEXT, UNSEEN


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    logging.disable(logging.CRITICAL)
    model, dictionaries = load_model(), load_dictionaries()
    held, cpu, wall = peak_mb(), cpu_seconds(), time.perf_counter()
    config = CollectConfig(tokens=int(sys.argv[1]), context=CONTEXT, top=6, strata=4, per_stratum=1, connections=0)
    cards = collect(model, dictionaries, UNSEEN, config, out=sys.argv[2])
    taken = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
    answer(tokens=cards.tokens_seen, **taken, peak_mb=peak_mb(), held_mb=held)


if __name__ == "__main__":
    main()

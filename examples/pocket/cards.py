"""Feature cards of the embedded dictionaries, collected over text of the corpus that nothing was trained on."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from circuitsae.features.cards import FeatureCards
from circuitsae.features.collection import CollectConfig, collect
from circuitsae.pocket.corpus import CONTEXT, UNSEEN
from transcoders import load_dictionaries, load_model
from transcoders.files import write_file

logger = logging.getLogger(__name__)

HEADING = "## Feature cards"
SETTINGS = CollectConfig(context=CONTEXT, top=6, strata=4, per_stratum=1)
"""Ten examples a feature, so that the cards of all three dictionaries weigh less than one of them."""

_SECTION = """{heading}

Written by `python -m examples.pocket.recipe --stage cards`: what every feature fires on and what it writes, collected
over {tokens:,} tokens of the recipe's text, from a seed that no training uses, and kept in `cards/` beside each
dictionary. `circuitsae trace` shows them, `circuitsae features browse pocket --out FOLDER` makes pages of them all.

| | minutes | MB | features | dead, by layer |
|---|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Collected:
    """The cards of one dictionary, as they are shipped."""

    name: str
    cards: FeatureCards
    megabytes: float
    seconds: float


def collect_all(model_dir: Path, dictionaries: Path, work: Path, *, quick: bool, progress: bool) -> list[Collected]:
    """Write `<dictionary>/cards` for every dictionary in a folder; a run that was killed goes on."""
    model = load_model(model_dir)
    model.name = "pocket"
    settings = CollectConfig(tokens=300, context=16, top=2) if quick else SETTINGS
    results = []
    for folder in sorted(path.parent for path in dictionaries.glob("*/config.json")):
        started = time.monotonic()
        cards = collect(
            model, load_dictionaries(folder), UNSEEN, settings, out=work / "cards" / folder.name, progress=progress
        )
        target = cards.save(folder / "cards")
        megabytes = sum(file.stat().st_size for file in target.iterdir()) / 1e6
        results.append(Collected(folder.name, cards, megabytes, time.monotonic() - started))
        logger.info("%s: %s", folder.name, _row(results[-1]))
    return results


def _row(collected: Collected) -> str:
    cards = collected.cards
    cells = (
        collected.name,
        f"{collected.seconds / 60:.1f}",
        f"{collected.megabytes:.1f}",
        f"{len(cards):,}",
        ", ".join(map(str, cards.manifest["dead"])),
    )
    return f"| {' | '.join(cells)} |"


def write_section(page: Path, results: list[Collected]) -> None:
    """Put the section on cards at the end of the page, in the place of an earlier one."""
    tokens = results[0].cards.tokens_seen
    section = _SECTION.format(heading=HEADING, tokens=tokens, rows="\n".join(map(_row, results)))
    before = page.read_text(encoding="utf-8").split(HEADING)[0].rstrip() + "\n\n" if page.exists() else ""
    write_file(page, before + section)

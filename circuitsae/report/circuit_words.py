"""What a circuit's picture shows, in sentences made from its numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence

from circuitsae.report.text import cut, printable, shorten

MARKS: Mapping[str, str] = {
    "confirmed": "✓",
    "reversed": "⇄",
    "null": "○",
    "undecided": "?",
    "attention": "A",
    "norms": "N",
}
"""Of each verdict its sign, as on the page of a graph."""
_NAMED, _FAILED = 3, 2
_TITLE = 40


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.0f} %" if share >= 0.005 or share == 0 else "less than 1 %"


def quoted(text: str) -> str:
    """A name as it is shown."""
    return printable(cut(text.strip() or repr(text)))


def of_answer(
    answer: str, into: Mapping[str, tuple[float, float]], kinds: Mapping[str, str], titles: Mapping[str, str]
) -> str:
    """Where an answer comes from: of each source that is drawn its share, then tokens, errors and the rest.

    into: of every source of the answer its share of all that flows in, and its weight.
    """
    drawn = sorted(
        (n for n in into if n in titles and kinds[n] in ("supernode", "feature")), key=lambda n: (-into[n][0], n)
    )
    parts = [f"{percent(into[n][0])} comes from {titles[n]}" + _against(into[n][1]) for n in drawn[:_NAMED]]
    parts = parts[:1] + [part.replace(" comes from", " from", 1) for part in parts[1:]]
    tokens, errors = (sum(share for n, (share, _) in into.items() if kinds[n] == kind) for kind in ("token", "error"))
    named = sum(into[n][0] for n in drawn[:_NAMED]) + tokens + errors
    parts += [f"{percent(tokens)} from tokens directly"] if tokens else []
    parts += [f"{percent(errors)} from what the dictionaries miss"] if errors else []
    rest = max(1.0 - named, 0.0)
    parts += [f"{percent(rest)} from other nodes"] if rest >= 0.005 else []
    return f"Of what flows into {answer}, {joined(parts)}." if parts else f"Nothing flows into {answer}."


def _against(weight: float) -> str:
    return " (against it)" if weight < 0 else ""


def of_path(path: Sequence[str], share: float, direct: tuple[str, str, float] | None, titles: Mapping[str, str]) -> str:
    """The strongest path through boxes, and what share passes along it; beside it a single arrow that carries more."""
    said = ""
    if len(path) > 2:
        said = f"The strongest path through boxes is {_arrows(path, titles)}, which {percent(share)} of that takes."
    if direct is None or direct[2] <= share:
        return said or "No path of arrows leads to the answer through a box."
    straight = f"{_arrows(direct[:2], titles)} carries {percent(direct[2])} directly"
    return f"{said[:-1]}; {straight}." if said else f"{straight}; no path leads through a box."


def _arrows(path: Sequence[str], titles: Mapping[str, str]) -> str:
    return " → ".join(titles[name] for name in path)


def of_tests(tested: Mapping[tuple[str, str], Counter[str]], titles: Mapping[str, str]) -> str:
    """How many edges within the arrows were tested, how many held, and where most did not."""
    if not tested:
        return "No edge within the arrows was tested (`circuitsae validate` does)."
    total = sum((Counter(counts) for counts in tested.values()), Counter())
    held, n = total["confirmed"], total.total()
    said = f"Of {n} tested {'edge' if n == 1 else 'edges'} within the arrows {held} held"
    if held == n:
        return f"{said}."
    others = ", ".join(f"{total[name]} {_OTHERS[name]}" for name in MARKS if name != "confirmed" and total[name])
    worst = sorted(tested, key=lambda edge: (tested[edge]["confirmed"] - tested[edge].total(), edge))
    where = [f"{titles[s]} → {titles[t]}" for s, t in worst[:_FAILED]
             if tested[s, t]["confirmed"] < tested[s, t].total()]  # fmt: skip
    return f"{said}; {others}, above all in {joined(where)}."


_OTHERS = {
    "reversed": "reversed",
    "null": "without effect",
    "undecided": "undecided",
    "attention": "carried by attention",
    "norms": "carried by norms",
}


def called(title: str, kind: str = "") -> str:
    """What a box is called in a sentence."""
    said = f"“{shorten(printable(title), _TITLE)}”"
    return f"token {said}" if kind == "token" else said


def joined(parts: Sequence[str]) -> str:
    """Parts in a row, with "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

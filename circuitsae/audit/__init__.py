"""What a circuit's evidence is worth: criteria put to the test, each with an interval and bars stated before.

A `Subject` (`heads`, `features`) is a circuit that can be cut out of its model; a `Criterion` asks it one question and
comes to a `Finding`. `claim` holds what is claimed, `measurement` how well it is measured, `internal` whether the
circuit causes the behaviour, `external` how far that reaches; `criteria` lists them all, `run` takes them in order.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.audit.claim import Claim
    from circuitsae.audit.features import FeatureSubject
    from circuitsae.audit.finding import Estimate, Finding, Rule
    from circuitsae.audit.heads import GivenSource, HeadSubject, TaskSource
    from circuitsae.audit.result import Audit
    from circuitsae.audit.run import audit
    from circuitsae.audit.settings import Settings
    from circuitsae.audit.subject import Choice, Cut, Judging, Subject

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.audit.claim": ("Claim",),
        "circuitsae.audit.features": ("FeatureSubject",),
        "circuitsae.audit.finding": ("Estimate", "Finding", "Rule"),
        "circuitsae.audit.heads": ("GivenSource", "HeadSubject", "TaskSource"),
        "circuitsae.audit.result": ("Audit",),
        "circuitsae.audit.run": ("audit",),
        "circuitsae.audit.settings": ("Settings",),
        "circuitsae.audit.subject": ("Choice", "Cut", "Judging", "Subject"),
    },
)

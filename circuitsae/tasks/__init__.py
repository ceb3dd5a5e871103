"""Tasks: pairs of a clean and a corrupt prompt, what should follow, and where the words that matter stand.

`load_task` (`load`) makes one of the built-in tasks for a model (`ioi`, `greater_than`, `two_hop`, `induction`,
`agreement`, `docstring`, `facts`, `antonyms`, `pronouns`: a module each) or reads a file (`files`). A `Task` (`task`)
is text; `Task.tokens` checks it against the model's own tokenizer and gives `PatchPair`s, tensors of one length, whose
metrics score logits per example. `behaviour` measures a model on a task, `known_examples` keeps what it gets right.
`wording` is what the generators share, `recall` what those do that ask about one subject.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.tasks.files import read_examples, write_examples
    from circuitsae.tasks.load import behaviour, known_examples, load_task, task_names
    from circuitsae.tasks.task import Example, Known, MetricName, PatchPair, Task, metric

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.tasks.task": (
            "Example",
            "Known",
            "MetricName",
            "PatchPair",
            "Task",
            "metric",
        ),
        "circuitsae.tasks.load": (
            "behaviour",
            "known_examples",
            "load_task",
            "task_names",
        ),
        "circuitsae.tasks.files": (
            "read_examples",
            "write_examples",
        ),
    },
)

"""Tasks: pairs of a clean and a corrupt prompt, what should follow, and where the words that matter stand.

`load_task` makes one of the built-in tasks for a model (`ioi`, `greater_than`, `two_hop`, `induction`, `agreement`,
`docstring`: a module each) or reads a file (`files`, `published`). A `Task` (`base`) is text; `Task.tokens` checks it
against the model's own tokenizer and gives `PatchPair`s, tensors of one length. `metrics` scores logits per example,
and `behaviour` measures a model on a task. `filling`, `lexicon` and `encoding` are what the generators share.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.tasks.base import Example, PatchPair, Task
    from circuitsae.tasks.files import read_examples, write_examples
    from circuitsae.tasks.load import load_task, task_names
    from circuitsae.tasks.measuring import behaviour
    from circuitsae.tasks.metrics import MetricName, metric

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.tasks.base": ("Example", "PatchPair", "Task"),
        "circuitsae.tasks.measuring": ("behaviour",),
        "circuitsae.tasks.files": ("read_examples", "write_examples"),
        "circuitsae.tasks.load": ("load_task", "task_names"),
        "circuitsae.tasks.metrics": ("MetricName", "metric"),
    },
)

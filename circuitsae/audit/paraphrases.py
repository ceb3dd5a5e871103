"""The same task in other words: templates that a task does not draw from by default."""

from circuitsae.pocket.families import IOI_TEMPLATES, SPAN_TEMPLATES
from circuitsae.tasks.ioi import PUBLISHED_TEMPLATES
from circuitsae.tasks.wording import is_pocket
from transcoders.language_model import LanguageModel


def other_templates(task: str, model: LanguageModel) -> tuple[str, ...]:
    """Templates for `load_task(task, model, templates=…)` that it lacks by default; empty where none are known."""
    if task == "ioi":
        own = [template.removesuffix("{IO}") for template in IOI_TEMPLATES]
        found, default = (PUBLISHED_TEMPLATES, own) if is_pocket(model) else (own, PUBLISHED_TEMPLATES)
        return tuple(template for template in found if template not in default)
    if task == "greater-than":
        return tuple(template for template in SPAN_TEMPLATES if template not in SPAN_TEMPLATES[:1])
    return ()

"""A task of texts as feature circuits take it: prompts that carry their metrics, and their corrupt twins."""

import torch

from circuitsae.interventions import Prompt
from circuitsae.tasks.task import Task
from circuitsae.validation.tasks import PromptExample, PromptTask
from transcoders.language_model import LanguageModel


def prompt_task(model: LanguageModel, task: Task) -> tuple[PromptTask, list[Prompt]]:
    """A task as feature circuits take it, and the corrupt prompts in the same order."""
    examples, corrupt = [], []
    for pair in task.tokens(model):
        corrupt += pair.prompts(corrupt=True)
        for i, prompt in enumerate(pair.prompts()):
            tokens, score = pair.clean[i], task.score(pair.take([i]))

            def measure(logits: torch.Tensor, score=score) -> torch.Tensor:
                return score(logits[..., None, None, :])[..., 0]

            examples.append(PromptExample(tokens, measure, prompt.roles, prompt.template))
    return PromptTask(examples, task.name), corrupt

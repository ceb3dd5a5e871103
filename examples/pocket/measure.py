"""The five behaviours of the pocket model, measured on prompts that training never saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2LMHeadModel

from circuitsae.pocket.corpus import held_out_text
from circuitsae.pocket.prompts import (
    DEMONSTRATION,
    Prompt,
    TwoHopPrompt,
    agreement_prompts,
    greater_than_prompts,
    induction_prompts,
    ioi_prompts,
    two_hop_prompts,
)

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Behaviours:
    """What the model does, one number each; `shortfalls` compares them with the bars the recipe promises."""

    demonstration: str
    """Most likely token after the demonstration prompt (" Mary")."""
    ioi_accuracy: float
    """Share of IOI prompts on which the indirect object outranks every token."""
    ioi_logit_diff: float
    """Mean logit of the indirect object minus that of the subject."""
    greater_than: float
    """Mean of sum p(y > start) - sum p(y <= start) over the two-digit tokens."""
    agreement_accuracy: float
    """Share of prompts on which the agreeing verb outranks the other number."""
    two_hop_trained: float
    """Top-1 on the cities of two-hop training, main phrasing."""
    two_hop_trained_all: float
    """Top-1 on the same cities, all phrasings."""
    two_hop_held_out: float
    """Top-1 on the cities never seen in two hops, main phrasing."""
    two_hop_held_out_all: float
    """Top-1 on the same cities, all phrasings."""
    induction_first: float
    """Loss in nats per token on the first copy of random words."""
    induction_second: float
    """Loss on the second copy."""
    held_out_loss: float
    """Loss on unseen text of the corpus."""

    def shortfalls(self) -> list[str]:
        """The promises that are not met; the held-out two-hop figure is an aim and is not among them."""
        bars = {
            "ioi_accuracy": 0.99,
            "ioi_logit_diff": 3.5,
            "greater_than": 0.75,
            "agreement_accuracy": 0.95,
            "two_hop_trained": 1.0,
        }
        short = [f"{name} {getattr(self, name):.4f} < {bar}" for name, bar in bars.items() if getattr(self, name) < bar]
        if self.demonstration != " Mary":
            short.append(f"demonstration {self.demonstration!r} != ' Mary'")
        if self.induction_second > self.induction_first / 4:
            short.append(f"induction_second {self.induction_second:.3f} > induction_first / 4")
        return short


@torch.no_grad()
def final_logits(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Float[Tensor, "n vocab"]:
    """Logits after the last token of each text, each text after `<|endoftext|>`."""
    rows = [[0, *tokenizer.encode(text).ids] for text in texts]
    out = []
    for start in range(0, len(rows), _BATCH):
        chunk = rows[start : start + _BATCH]
        width = max(map(len, chunk))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in chunk])
        last = torch.tensor([len(row) - 1 for row in chunk])
        out.append(model(tokens, use_cache=False).logits[torch.arange(len(chunk)), last])
    return torch.cat(out)


def single_ids(tokenizer: Tokenizer, words: Sequence[str]) -> Tensor:
    """The token of each word; a word that is not one token raises."""
    encoded = [tokenizer.encode(word).ids for word in words]
    for word, ids in zip(words, encoded, strict=True):
        if len(ids) != 1:
            raise ValueError(f"{word!r} is {len(ids)} tokens of the pocket tokenizer, expected one")
    return torch.tensor([ids[0] for ids in encoded])


def logit_differences(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> tuple[Float[Tensor, " n"], float]:
    """Answer minus wrong answer on each prompt, and the share of prompts whose top token is the answer."""
    logits = final_logits(model, tokenizer, [p.text for p in prompts])
    index = torch.arange(len(prompts))
    answer = single_ids(tokenizer, [p.answer for p in prompts])
    wrong = single_ids(tokenizer, [p.wrong for p in prompts])
    top = (logits.argmax(-1) == answer).float().mean().item()
    return logits[index, answer] - logits[index, wrong], top


def greater_than_difference(model: GPT2LMHeadModel, tokenizer: Tokenizer, n: int, seed: int) -> float:
    """Mean probability of later years minus that of the start and earlier ones (Hanna et al. 2023)."""
    prompts = greater_than_prompts(n, seed)
    years = single_ids(tokenizer, [f"{year:02d}" for year in range(100)])
    probabilities = final_logits(model, tokenizer, [p.text for p in prompts]).softmax(-1)[:, years]
    later = torch.arange(100) > torch.tensor([p.start for p in prompts])[:, None]
    return torch.where(later, probabilities, -probabilities).sum(-1).mean().item()


def two_hop_top1(model: GPT2LMHeadModel, tokenizer: Tokenizer, prompts: Sequence[TwoHopPrompt]) -> tuple[float, float]:
    """Top-1 in the main phrasing, and over all phrasings."""
    logits = final_logits(model, tokenizer, [p.text for p in prompts])
    right = (logits.argmax(-1) == single_ids(tokenizer, [p.answer for p in prompts])).float()
    main = torch.tensor([p.template == 0 for p in prompts])
    return right[main].mean().item(), right.mean().item()


@torch.no_grad()
def token_losses(model: GPT2LMHeadModel, tokens: Tensor) -> Float[Tensor, "row position"]:
    """Loss in nats of each next token."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def induction_losses(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, n: int, seed: int, length: int = 24
) -> tuple[float, float]:
    """Mean loss on the first and on the second copy."""
    rows = [[0, *tokenizer.encode(text).ids] for text in induction_prompts(n, seed, length=length)]
    losses = token_losses(model, torch.tensor(rows))
    return losses[:, :length].mean().item(), losses[:, length:].mean().item()


def corpus_loss(model: GPT2LMHeadModel, tokenizer: Tokenizer, n_tokens: int, seed: int = 0) -> float:
    """Mean loss per token on unseen texts."""
    total, count = 0.0, 0
    for text in held_out_text(n_tokens, seed, tokenizer=tokenizer):
        losses = token_losses(model, torch.tensor([[0, *tokenizer.encode(text).ids][:512]]))
        total += losses.sum().item()
        count += losses.numel()
    return total / count


def measure(model: GPT2LMHeadModel, tokenizer: Tokenizer, *, n: int = 1000, seed: int = 0) -> Behaviours:
    """All five behaviours on `n` prompts each (two hops: on every city) and the loss on `20 n` tokens of text."""
    top = final_logits(model, tokenizer, [DEMONSTRATION]).argmax().item()
    ioi_diff, ioi_top = logit_differences(model, tokenizer, ioi_prompts(n, seed))
    agreement_diff, _ = logit_differences(model, tokenizer, agreement_prompts(n, seed))
    trained = two_hop_top1(model, tokenizer, two_hop_prompts(held_out_cities=False))
    unseen = two_hop_top1(model, tokenizer, two_hop_prompts(held_out_cities=True))
    first, second = induction_losses(model, tokenizer, min(n, 200), seed)
    return Behaviours(
        demonstration=tokenizer.decode([int(top)]),
        ioi_accuracy=ioi_top,
        ioi_logit_diff=ioi_diff.mean().item(),
        greater_than=greater_than_difference(model, tokenizer, n, seed),
        agreement_accuracy=(agreement_diff > 0).float().mean().item(),
        two_hop_trained=trained[0],
        two_hop_trained_all=trained[1],
        two_hop_held_out=unseen[0],
        two_hop_held_out_all=unseen[1],
        induction_first=first,
        induction_second=second,
        held_out_loss=corpus_loss(model, tokenizer, 20 * n, seed),
    )

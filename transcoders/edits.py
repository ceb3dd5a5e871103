"""Hooks that change activations: in the shape of one vector per token, one after the other, in the stream's middle."""

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

Hook = Callable[[Tensor], Tensor | None]


def apart(value: Tensor, tokens: Int[Tensor, "batch pos"]) -> Tensor:
    """Where the bridge has one axis of all tokens, batch and position apart."""
    return value.unflatten(0, tokens.shape) if value.ndim == 2 and len(value) == tokens.numel() else value


def in_the_middle(edit: Hook) -> tuple[Hook, Hook]:
    """Hooks for `resid_pre` and `attn_added` by which `edit` changes the stream between them, `resid_mid`.

    That place itself is only seen by the MLP's norm; what is written there would not stay in the stream.
    """
    before: list[Tensor] = []

    def note(resid_pre: Tensor) -> None:
        before[:] = [resid_pre]

    def change(added: Tensor) -> Tensor | None:
        stream = before[0] + added
        changed = edit(stream)
        return None if changed is None else added + (changed - stream)

    return note, change


def by_token(edit: Hook) -> Hook:
    """`edit`, which sees one vector per token, in the hook's own shape."""

    def reshaped(value: Tensor) -> Tensor | None:
        changed = edit(value.flatten(2))
        return None if changed is None else changed.reshape(value.shape)

    return reshaped


def after(first: Hook, second: Hook) -> Hook:
    """Both edits of one hook, one after the other."""

    def both(value: Tensor) -> Tensor | None:
        changed = first(value)
        again = second(value if changed is None else changed)
        return changed if again is None else again

    return both

"""Where in a model one reads and writes. The only module that knows hook names."""

from dataclasses import dataclass
from typing import Literal, get_args

from transcoders.errors import InputError

SiteKind = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "mlp_in",
    "mlp_normed",
    "mlp_neurons",
    "mlp_out",
    "mlp_added",
    "attn_z",
    "attn_out",
    "attn_added",
]

MLP_READS: tuple[SiteKind, ...] = ("mlp_in", "mlp_normed", "resid_mid")
MLP_WRITES: tuple[SiteKind, ...] = ("mlp_out", "mlp_added")
"""What dictionaries may read and write in the place of an MLP."""

_HOOKS: dict[SiteKind, tuple[str, ...]] = {
    "resid_pre": ("hook_in",),
    "resid_mid": ("hook_resid_mid",),
    "resid_post": ("hook_out",),
    "mlp_in": ("mlp.hook_in",),
    "mlp_normed": ("ln2.hook_normalized", "ln1.hook_normalized"),  # one norm for attention and MLP: GPT-J, Phi, Cohere
    "mlp_neurons": ("mlp.out.hook_in",),
    "mlp_out": ("mlp.hook_out",),
    "mlp_added": ("hook_mlp_out",),
    "attn_z": ("attn.o.hook_in",),
    "attn_out": ("attn.hook_out",),
    "attn_added": ("hook_attn_out",),
}


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One activation vector per token: `layer` counts from 0, `kind` names the place in the block.

    | kind | what | TransformerLens 2 |
    |---|---|---|
    | `resid_pre`, `resid_post` | the residual stream before and after the block | `hook_resid_pre`, `hook_resid_post` |
    | `resid_mid` | the stream between attention and MLP; parallel blocks have none | `hook_resid_mid` |
    | `mlp_in` | what the MLP reads, after its norm | |
    | `mlp_normed` | what the MLP's norm gives before its weight and bias | `ln2.hook_normalized` |
    | `mlp_neurons` | what the MLP's last matrix reads (width d_mlp) | `mlp.hook_post` |
    | `mlp_out`, `attn_out` | what MLP and attention give, before any norm of their own | |
    | `mlp_added`, `attn_added` | what they add to the stream: after that norm | `hook_mlp_out`, `hook_attn_out` |
    | `attn_z` | what W_O reads: all heads side by side (width n_heads · d_head) | `attn.hook_z` |

    Only where a norm (Gemma 2 and 3, OLMo 2) or a factor (Granite) follows do `mlp_out` and `mlp_added` differ.
    """

    layer: int
    kind: SiteKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise InputError(f"Unknown site {self.kind!r}; the sites are {', '.join(get_args(SiteKind))}.")
        if self.layer < 0:
            raise InputError(f"A site's layer counts from 0; got {self.layer}.")

    @property
    def hooks(self) -> tuple[str, ...]:
        """TransformerBridge's names for this site; a model's is the first of them that it has."""
        return tuple(f"blocks.{self.layer}.{name}" for name in _HOOKS[self.kind])

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that `str(site)` names, such as `"3.mlp_in"`."""
        layer, _, kind = text.partition(".")
        if not layer.isdecimal() or kind not in get_args(SiteKind):
            raise InputError(
                f"Cannot read site {text!r}; expected LAYER.KIND such as '3.mlp_in', of the "
                f"kinds {', '.join(get_args(SiteKind))}."
            )
        return cls(int(layer), kind)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class Frame:
    """The coordinates a model's weights are in.

    The same hook carries another tensor once norm weights are folded into their readers or writing
    weights are centred, so a dictionary is only valid in the frame it was trained in.
    """

    name: Literal["raw", "folded"] = "raw"
    """`raw`: the weights as published, nothing folded or centred. `folded`: TransformerLens' processed weights."""

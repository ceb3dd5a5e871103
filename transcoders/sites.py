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

_HOOKS: dict[SiteKind, str] = {
    "resid_pre": "hook_in",
    "resid_mid": "ln2.hook_in",
    "resid_post": "hook_out",
    "mlp_in": "mlp.hook_in",
    "mlp_normed": "ln2.hook_normalized",
    "mlp_neurons": "mlp.out.hook_in",
    "mlp_out": "mlp.hook_out",
    "mlp_added": "mlp.hook_out",
    "attn_z": "attn.o.hook_in",
    "attn_out": "attn.hook_out",
    "attn_added": "attn.hook_out",
}


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One activation vector per token: `layer` counts from 0, `kind` names the place in the block.

    `mlp_in` is what the MLP reads, after its norm; `mlp_out` what it adds to the residual stream.
    """

    layer: int
    kind: SiteKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise InputError(f"Unknown site {self.kind!r}; the sites are {', '.join(get_args(SiteKind))}.")
        if self.layer < 0:
            raise InputError(f"A site's layer counts from 0; got {self.layer}.")

    @property
    def hook(self) -> str:
        """Name of the TransformerBridge hook that carries this site."""
        return f"blocks.{self.layer}.{_HOOKS[self.kind]}"

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that `str(site)` names, such as `"3.mlp_in"`."""
        layer, _, kind = text.partition(".")
        if not layer.isdigit():
            raise InputError(f"Cannot read site {text!r}; expected LAYER.KIND such as '3.mlp_in'.")
        return cls(int(layer), kind)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class Frame:
    """The coordinates a model's weights are in.

    The same hook carries another tensor once norm weights are folded into their readers or writing
    weights are centred, so a dictionary is only valid in the frame it was trained in.
    """

    name: Literal["raw", "folded"] = "raw"
    """`raw`: the weights as published, nothing folded or centred. `folded`: TransformerLens' processed weights."""

"""What `circuitsae trace` is asked to explain, as options of the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from transcoders.errors import InputError

if TYPE_CHECKING:
    from circuitsae.attribution.targets import ChooseTargets


@dataclass(frozen=True)
class TargetChoice:
    """What the graph explains; without any of these the most probable next tokens."""

    target: tuple[str, ...] = ()
    """Token to explain, one token of the model; repeat it for several."""
    contrast: Annotated[tuple[str, str] | None, tyro.conf.DisallowNone] = None
    """Two tokens: explain the logit of the first less that of the second."""
    target_feature: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Explain what made a feature fire, such as 2.713@5 or 2.713."""
    direction: Annotated[Path | None, tyro.conf.DisallowNone] = None
    """Explain what a vector reads, that of a probe, in a file (.npy, .json, .safetensors)."""
    direction_site: str = "final"
    """Where it reads: as the dictionary of a layer does, such as 3.mlp_in, or after the final norm."""
    position: Annotated[int | None, tyro.conf.DisallowNone] = None
    """Explain what comes after this token, counted from 0, or from the end with -1; default, the last."""

    def chosen(self) -> "ChooseTargets":
        """As `attribute` takes it. Raises `InputError` for options that exclude each other, or a wrong value."""
        from circuitsae.attribution import Contrast, DirectionTarget, LogitTargets, TopLogits

        given = [name for name in ("target", "contrast", "target_feature", "direction") if getattr(self, name)]
        if len(given) > 1:
            named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{named} exclude each other; a graph explains one of them.")
        at = -1 if self.position is None else self.position
        if self.direction_site != "final" and self.direction is None:
            raise InputError(
                f"--direction-site {self.direction_site} says where a direction reads; give --direction as well."
            )
        if self.contrast is not None:
            return Contrast(*self.contrast, position=at)
        if self.target_feature is not None:
            return self._feature(self.target_feature)
        if self.direction is not None:
            return DirectionTarget(read_vector(self.direction), self.direction_site, at, self.direction.stem)
        return LogitTargets(self.target, position=at) if self.target else TopLogits(position=at)

    def _feature(self, name: str) -> "ChooseTargets":
        from circuitsae.attribution import FeatureTarget
        from circuitsae.interventions.targets import Feature, parse_target

        found = parse_target(name)
        if not isinstance(found, Feature) or not isinstance(found.at, int | None):
            raise InputError(f"--target-feature {name!r} is no feature at a position; write it like 2.713@5.")
        if found.at is not None and self.position is not None:
            raise InputError(f"--target-feature {name} names a position already; leave --position out.")
        at = self.position if found.at is None else found.at
        return FeatureTarget(found.layer, found.index, -1 if at is None else at)


TargetOptions = Annotated[TargetChoice, tyro.conf.arg(name="")]


def read_vector(path: Path) -> Any:
    """The one vector in a file: an array of npy, a list in JSON, the only tensor of safetensors."""
    import json

    import numpy as np

    try:
        match path.suffix:
            case ".npy":
                found = np.load(path, allow_pickle=False)
            case ".json":
                found = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=float)
            case ".safetensors":
                from safetensors.torch import load_file

                tensors = load_file(path)
                if len(tensors) != 1:
                    raise InputError(f"{path} has {len(tensors)} tensors; give a file with the one to read with.")
                found = next(iter(tensors.values())).double().numpy()
            case _:
                raise InputError(f"{path} is no .npy, .json or .safetensors file; give a vector in one of these.")
        vector = np.squeeze(found).astype(np.float64)
    except InputError:
        raise
    except Exception as error:  # whatever a stranger's file makes its reader say
        raise InputError(f"{path} cannot be read as a vector ({error}); give an array of one row.") from error
    if vector.ndim != 1:
        raise InputError(f"{path} has an array of shape {found.shape}; give one row of numbers.")
    return vector

"""How much of each layer is left out: a schedule, from sensitivities and a FLOP target.

SparseLoRA (ICML 2025), section 3.3, has hand-made schedules from per-layer sensitivity curves. Here
they are the solution of: least rise of the task's loss, as far as the effects of single parts add
up (`tinyft/sparse/sensitivity.py`), for so many FLOPs saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from tinyft.errors import InputError

Key = tuple[int, str]
Floats = NDArray[np.float64]
LEVELS = (0.5, 0.75, 0.9, 0.97)  # sparsities that are tried


def costs(effects: Floats) -> Floats:
    """What leaving out is charged: (n, levels), from effects of the same shape and at least 0.

    Never less for more: at least what a lower level has, and a little above that.
    """
    little = 1e-9 * (effects.mean() or 1.0)
    return np.maximum.accumulate(effects, axis=1) + little * np.arange(1, effects.shape[1] + 1)


def solve(
    cost: Floats, saved: Floats, need: float, levels: Sequence[float] = LEVELS
) -> Floats | None:
    """Sparsities (n,) of least cost that save `need`; None if even the highest do not.

    A multiple-choice knapsack by its Lagrangian: at a price of saving, each row takes its best
    level; between the two prices around `need` the rows that differ go part of the way.

    Args:
        cost: (n, levels) of each level; leaving nothing out costs nothing.
        saved: (n,) FLOPs at sparsity 1; in proportion below.
    """
    steps = np.concatenate([[0.0], levels])
    cost = np.concatenate([np.zeros((len(cost), 1)), cost], axis=1)

    def at(price: float) -> Floats:
        return steps[np.argmin(cost - price * saved[:, None] * steps, axis=1)]

    if need <= 0:
        return np.zeros(len(saved))
    if float(saved.sum()) * steps[-1] < need:
        return None
    low, high = 0.0, 1.0 / float(saved.max())
    while float(at(high) @ saved) < need:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if float(at(middle) @ saved) >= need else (middle, high)
    less, more = at(low), at(high)
    a, b = float(less @ saved), float(more @ saved)
    return less if a >= need or a == b else less + (need - a) / (b - a) * (more - less)


def read(path: str | Path, known: Sequence[Key]) -> dict[Key, float]:
    """A schedule from YAML: `{ffn: {3: 0.9, 4: 0.9}, qk: {...}, vo: {...}}`, sparsity by layer.

    Raises:
        InputError: not readable, or of another form or model.
    """
    try:
        found = yaml.safe_load(Path(path).read_text())
        schedule = {
            (int(layer), str(part)): float(sparsity)
            for part, layers in found.items()
            for layer, sparsity in layers.items()
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The schedule {path} cannot be read: {error}.") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"The schedule {path} is no mapping of parts to layers to sparsities, such as "
            f"`ffn: {{3: 0.9, 4: 0.9}}`."
        ) from error
    wrong = [f"{part} {layer}" for layer, part in schedule if (layer, part) not in set(known)]
    wrong += [f"{p} {n}: {s:g}" for (n, p), s in schedule.items() if not 0 <= s < 1]
    if wrong:
        raise InputError(
            f"The schedule {path} has {', '.join(wrong[:5])}; layers of this model are 0 to "
            f"{max(n for n, _ in known)}, parts {', '.join(sorted({p for _, p in known}))}, and "
            f"sparsities at least 0 and below 1."
        )
    return schedule


def write(path: str | Path, schedule: Mapping[Key, float]) -> None:
    """The inverse of `read`."""
    parts: dict[str, dict[int, float]] = {}
    for (layer, part), sparsity in sorted(schedule.items()):
        if sparsity > 0:
            parts.setdefault(part, {})[layer] = round(float(sparsity), 4)
    Path(path).write_text(yaml.safe_dump(parts))


def summary(schedule: Mapping[Key, float]) -> str:
    """For people: parts, in how many layers, and how sparse."""
    said = []
    for part in sorted({part for _, part in schedule}):
        found = [s for (_, p), s in schedule.items() if p == part and s > 0]
        if found:
            said.append(
                f"{part} of {len(found)} layers, {min(found):.0%} to {max(found):.0%} left out"
            )
    return "; ".join(said) or "nothing"

"""From losses at perturbed weights to the projected gradient of each probe.

* `two-sided` (SPSA; MeZO, algorithm 1): g_p = (L(theta + eps z_p) - L(theta - eps z_p)) / 2 eps,
  and the step's gradient estimate is the mean of g_p z_p over the probes. Two forward passes a
  probe.
* `one-sided` (FZOO's normalised form): g_p = (L(theta + eps z_p) - L(theta)) / sigma, sigma the
  standard deviation of the probes' losses. One pass a probe and one for all; dividing by sigma
  takes the scale of the loss and of eps out of the learning rate. At least two probes.
* `centred`: the same with the probes' mean in the place of L(theta), g_p = (L(theta + eps z_p) -
  mean) / sigma: one pass a probe. What curvature adds to the loss of every probe, eps^2 tr(H) / 2,
  which one-sided would take for a slope along all of them, drops out, and |g_p| stays below the
  root of the number of probes.

A step uses g as the seed log stores it, so that a replay uses the very numbers that the run used:
where it is of the order of 1 whatever the model, in float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ESTIMATORS = ("two-sided", "one-sided", "centred")
STORED_AS = {"two-sided": "float32", "one-sided": "float16", "centred": "float16"}


def evaluation_points(estimator: str, probes: int) -> list[tuple[int | None, int]]:
    """Where to evaluate: `(probe, sign)` a point; probe None is theta itself."""
    if estimator == "two-sided":
        return [(p, sign) for p in range(probes) for sign in (1, -1)]
    at_theta = [(None, 0)] if estimator == "one-sided" else []
    return [*at_theta, *((p, 1) for p in range(probes))]


def projected_gradients(
    estimator: str, losses: Sequence[float], eps: float
) -> tuple[float, list[float]]:
    """The step's loss and each probe's projected gradient, rounded to what is stored.

    Args:
        losses: one a point, in the order of `evaluation_points`.

    Returns:
        the loss at theta (one-sided) or the mean over all points, equal to O(eps^2), and one value
        a probe.
    """
    values = np.asarray(losses, dtype=np.float64)
    if estimator == "two-sided":
        g = (values[0::2] - values[1::2]) / (2 * eps)
        loss = float(values.mean())
    else:
        loss, probes = float(values.mean()), values
        if estimator == "one-sided":
            loss, probes = float(values[0]), values[1:]
        sigma = probes.std(ddof=1)
        # All probes alike: no direction is better than another, and 0 / 0 must not become NaN.
        g = (probes - loss) / sigma if sigma > 0 else np.zeros(len(probes))
    stored = np.dtype(STORED_AS[estimator])
    largest = float(np.finfo(stored).max)  # probes alike, and all of them far from theta
    return loss, np.clip(g, -largest, largest).astype(stored).tolist()

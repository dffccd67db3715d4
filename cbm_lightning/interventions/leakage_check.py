"""Says in words when correct interventions make the label worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

SMALLEST_FALL = 0.005
"""Falls below half a percentage point are not worth a warning, however many samples show them."""


class LeakageWarning(UserWarning):
    """Correct interventions lower the label accuracy."""


def describe_fall(budgets: Sequence[int], scores: Mapping[str, Tensor], samples: int, unit: str) -> str | None:
    """What to tell the user if the score falls though every answer was right.

    Args:
        budgets: The ``R`` budgets.
        scores: Policy to ``[R]`` accuracies, averaged over its trials.
        samples: How many samples they are measured on.
        unit: What one budget step asks about (``"concept"``, ``"group"``).

    Returns:
        A message with the numbers, or None if no fall exceeds two standard errors and half a percentage point.
    """
    complaints = []
    for policy, curve in scores.items():
        start, end = float(curve[0]), float(curve[-1])
        top = int(curve.argmax())
        peak = float(curve[top])
        # a metric that is no share of samples may lie outside [0, 1]
        spread = math.sqrt(max(peak * (1 - peak) + end * (1 - end), 0.0) / max(samples, 1))
        fall = peak - end
        if fall <= max(SMALLEST_FALL, 2 * spread):
            continue
        steps = f"{budgets[-1]} {unit}{'s' if budgets[-1] != 1 else ''}"
        if top == 0:
            complaints.append(f"{policy}: from {start:.3f} uncorrected to {end:.3f} with {steps} corrected")
        else:
            complaints.append(
                f"{policy}: from {peak:.3f} with {budgets[top]} corrected to {end:.3f} with {steps} corrected "
                f"({start:.3f} uncorrected)"
            )
    if not complaints:
        return None
    return (
        f"correct interventions lower the label accuracy ({samples} samples). {'; '.join(complaints)}. The head reads "
        "something in the predicted concepts that the true ones do not say (leakage), or meets corrected values that "
        "it never saw in training. Train it on annotations (phases: independent), correct concepts during training "
        "(randint), weigh the concept loss more, or look for missing concepts"
    )

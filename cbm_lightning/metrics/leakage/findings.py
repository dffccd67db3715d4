"""What the measures of leakage found, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

from torch import Tensor

from cbm_lightning.metrics.leakage.evidence import Measurement

DOUBT = 0.001
"""Chance of calling noise a finding; shared among the concepts where each is asked about."""
NAMED = 5
"""So many concepts are named at most."""
ADVICE = (
    "What lessens it: train the label head on annotations (phases: independent), let it read hard concepts, weigh the "
    "concept loss more, or give the concept set what it misses; a residual head beside the concepts says openly what "
    "they cannot."
)


def findings(
    measured: Mapping[str, Measurement],
    names: Sequence[str],
    accuracy: float,
    samples: int,
    best_accuracy: float | None = None,
) -> list[str]:
    """Sentences about what leaks, how much, through which concepts, and what to do, or that nothing was found.

    A finding is what exceeds its own uncertainty by so much that chance does it in one case of a thousand.

    Args:
        measured: By name of the measure, as in `LeakageResult`.
        names: Of the concepts.
        accuracy: Label accuracy of the model.
        samples: How many samples were judged.
        best_accuracy: The best label accuracy that the true concepts allow, where it is known.
    """
    said: list[str] = []
    verdicts = [_above_the_best(said, accuracy, samples, best_accuracy)]
    for name, speak in (("ceiling", _ceiling), ("conditional_mi", _conditional)):
        if name in measured:
            verdicts.append(speak(said, measured[name], names))
    mixed = "ctl" in measured and _task(said, measured["ctl"], names)
    for name, add in (
        ("head_on_truth", _head),
        ("ois", _other_concepts),
        ("nis", _niches),
        ("completeness", _complete),
    ):
        if name in measured:
            add(said, measured[name], names)
    if any(verdicts):
        return [f"Label information leaks through the concepts ({samples} samples).", *said, ADVICE]
    if mixed:
        headline = "Predicted concepts carry label information that belongs to other concepts"
        return [f"{headline} ({samples} samples).", *said, ADVICE]
    if "ctl" in measured or any(verdict is not None for verdict in verdicts):
        limits = "Probes and neighbours find lower bounds: what they miss may still be there."
        return [f"No leakage of label information was found ({samples} samples).", *said, limits]
    return said


def is_found(value: float, error: float, among: int = 1, repeats: int | None = None) -> bool:
    """Whether a value lies above zero by more than chance explains.

    Args:
        value: Of the measure.
        error: A standard error over samples, or the deviation over ``repeats``.
        among: So many values are asked about at once.
        repeats: Number of repeats that the error was taken from; few of them say little of it (Student's t).
    """
    if repeats is None:
        return value > NormalDist().inv_cdf(1 - DOUBT / among) * error and value > 0
    from scipy.stats import t  # type: ignore[import-untyped]

    return bool(value > t.ppf(1 - DOUBT / among, repeats - 1) * error and value > 0)


def leaking(values: Tensor, errors: Tensor) -> list[int]:
    """Positions of the concepts ``[K]`` that are found, largest first; NaN is none."""
    found = [k for k in range(len(values)) if is_found(float(values[k]), float(errors[k]), len(values))]
    return sorted(found, key=lambda k: -float(values[k]))


def _above_the_best(said: list[str], accuracy: float, samples: int, best: float | None) -> bool | None:
    if best is None:
        return None
    error = (max(accuracy * (1 - accuracy), 0.25 / samples) / samples) ** 0.5
    above = is_found(accuracy - best, error)
    where = "lies above" if above else "does not lie above"
    said.append(
        f"The label accuracy of {accuracy:.3f} (±{error:.3f}) {where} {best:.3f}, the best that the true concepts "
        f"allow on this data{': the model reads something else than its concepts' if above else ''}."
    )
    return above


def _ceiling(said: list[str], ceiling: Measurement, names: Sequence[str]) -> bool:
    above = is_found(ceiling.value, ceiling.error)
    than = "less than the model's" if above else "and the model is not found to be better:"
    said.append(
        f"A probe reads the label from the true concepts with an accuracy of {ceiling.details['ceiling']:.3f}, {than} "
        f"{ceiling.details['acc']:.3f} (difference {ceiling.value:+.3f} ±{ceiling.error:.3f})."
    )
    return above


def _conditional(said: list[str], found: Measurement, names: Sequence[str]) -> bool:
    leaks = is_found(found.value, found.error)
    amount = f"{found.value:.3f} ±{found.error:.3f} nats"
    if leaks:
        said.append(
            f"The predicted concepts carry {amount} of label information beyond the true ones, of "
            f"{found.details['nll']:.3f} that these leave open ({found.details['share']:.0%})."
        )
    else:
        said.append(f"Probes find no label information in the predicted concepts beyond the true ones ({amount}).")
    # errors of single concepts know nothing of how a probe happened to be fitted, so they name but do not decide
    if leaks and found.per_concept is not None and found.concept_error is not None:
        each = leaking(found.per_concept, found.concept_error)
        if each:
            listed = ", ".join(f"{names[k]} ({float(found.per_concept[k]):.3f})" for k in each[:NAMED])
            said.append(f"Each by itself, {len(each)} of {len(names)} concepts carry some of it, most: {listed}.")
    if "extra" in found.details and is_found(found.details["extra"], found.details["extra_error"]):
        said.append(
            f"The free dimensions beside the concepts alone carry {found.details['extra']:.3f} "
            f"±{found.details['extra_error']:.3f} nats."
        )
        return True
    return leaks


def _task(said: list[str], found: Measurement, names: Sequence[str]) -> bool:
    if found.per_concept is None or found.concept_error is None:
        return False
    each = leaking(found.per_concept, found.concept_error)
    if not each:
        said.append("No predicted concept says more of the label than its true values do (CTL).")
        return False
    listed = ", ".join(f"{names[k]} ({float(found.per_concept[k]):+.0%})" for k in each[:NAMED])
    said.append(
        f"{len(each)} of {len(names)} predicted concepts say more of the label than their true values do, in shares of "
        f"its entropy (CTL {found.value:.3f}): {listed}."
    )
    return True


def _head(said: list[str], found: Measurement, names: Sequence[str]) -> None:
    numbers = f"from {found.details['acc']:.3f} to {found.details['acc_on_truth']:.3f}"
    if is_found(found.value, found.error):
        said.append(
            f"With every concept corrected the accuracy falls {numbers}: the head reads its concepts otherwise than "
            "people do, or never met such values."
        )
    elif is_found(-found.value, found.error):
        said.append(f"With every concept corrected the accuracy rises {numbers}.")
    else:
        said.append(f"With every concept corrected the accuracy stays the same within its uncertainty ({numbers}).")


def _other_concepts(said: list[str], found: Measurement, names: Sequence[str]) -> None:
    excess, error = found.details["excess"], found.details["excess_error"]
    if is_found(excess, error, repeats=int(found.details["repeats"])):
        said.append(
            f"Predicted concepts tell the other concepts better than the true ones do, by {excess:.3f} ±{error:.3f} "
            f"of AUROC (oracle impurity {found.value:.3f})."
        )
    else:
        said.append(
            "Predicted concepts are not found to tell the other concepts better than the true ones do "
            f"({excess:+.3f} ±{error:.3f} of AUROC; oracle impurity {found.value:.3f}, which counts wrong concepts "
            "too)."
        )


def _niches(said: list[str], found: Measurement, names: Sequence[str]) -> None:
    details = found.details
    impure = is_found(details["excess"], details["excess_error"], repeats=int(details["repeats"]))
    said.append(
        f"What lies outside a concept's niche tells it {'better' if impure else 'not provably better'} than among the "
        f"true concepts (niche impurity {found.value:.3f} against {details['truth']:.3f}, "
        f"±{details['excess_error']:.3f})."
    )


def _complete(said: list[str], found: Measurement, names: Sequence[str]) -> None:
    if found.value == found.value:
        said.append(
            "Of what a linear probe on the features tells of the label beyond chance "
            f"({found.details['probe_acc']:.3f} over {found.details['chance']:.3f}), the "
            f"model through its concepts reaches {found.value:.0%}."
        )

"""All measures of leakage of one model on one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.metrics.leakage.completeness import completeness_score
from cbm_lightning.metrics.leakage.concept_task_leakage import concept_task_leakage, inter_concept_leakage
from cbm_lightning.metrics.leakage.conditional_information import TruthProbe, conditional_information
from cbm_lightning.metrics.leakage.evidence import Evidence, Measurement, Splits
from cbm_lightning.metrics.leakage.findings import findings
from cbm_lightning.metrics.leakage.head_on_truth import ceiling_gap, head_on_truth
from cbm_lightning.metrics.leakage.niche_impurity import niche_impurity_score
from cbm_lightning.metrics.leakage.oracle_impurity import oracle_impurity_score

if TYPE_CHECKING:
    import pandas as pd

Measure = Literal["ctl", "icl", "conditional_mi", "head_on_truth", "ois", "nis", "completeness"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT: tuple[Measure, ...] = tuple(name for name in MEASURES if name != "icl")


@dataclass(frozen=True)
class Sightings:
    """A model's evidence, and what else its measures need.

    Attributes:
        evidence: Predicted and true concepts and the label of ``N`` samples.
        correct: ``[N]`` whether (for several labels: which share of) the predicted label is right.
        correct_on_truth: ``[N]`` the same where every annotated concept is corrected; None leaves this out.
        features: ``[N, D]`` what the concepts are predicted from; None leaves completeness out.
    """

    evidence: Evidence
    correct: Tensor
    correct_on_truth: Tensor | None = None
    features: Tensor | None = None

    def rows(self, rows: Tensor) -> Sightings:
        """Some of the samples."""
        truth, features = (None if x is None else x[rows] for x in (self.correct_on_truth, self.features))
        return Sightings(self.evidence.rows(rows), self.correct[rows], truth, features)

    def settled(self) -> Sightings:
        """In double precision on the CPU, outside inference mode."""

        def settle(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().cpu().double().clone()

        with torch.inference_mode(False):
            truth, features = settle(self.correct_on_truth), settle(self.features)
            return Sightings(self.evidence.settled(), self.correct.detach().cpu().double().clone(), truth, features)


@dataclass(frozen=True)
class LeakageResult:
    """What the measures found.

    Attributes:
        measurements: By name of the measure; ``head_on_truth`` comes with ``ceiling``, what a probe reads from the
            true concepts.
        names: Of the concepts.
        samples: How many samples were judged.
        best_accuracy: The best label accuracy that the true concepts allow, where it is known.
        sentences: What was found, in words.
    """

    measurements: dict[str, Measurement]
    names: Sequence[str]
    samples: int
    best_accuracy: float | None
    sentences: list[str]

    def scalars(self) -> dict[str, float]:
        """The numbers worth logging, by name: each measure, ``..._error`` beside it where it has one, and others."""
        found: dict[str, float] = {"samples": float(self.samples)}
        logged = {"head_on_truth": "head_gap", "ceiling": "ceiling_gap"}
        for name, measured in self.measurements.items():
            key = logged.get(name, name)
            found[key] = measured.value
            if measured.error == measured.error:
                found[f"{key}_error"] = measured.error
        details = {
            "conditional_mi_share": ("conditional_mi", "share"),
            "head_on_truth_acc": ("head_on_truth", "acc_on_truth"),
            "ceiling_acc": ("ceiling", "ceiling"),
            "conditional_mi_extra": ("conditional_mi", "extra"),
            "ois_excess": ("ois", "excess"),
            "nis_truth": ("nis", "truth"),
        }
        for key, (name, detail) in details.items():
            if name in self.measurements and detail in self.measurements[name].details:
                found[key] = self.measurements[name].details[detail]
        if self.best_accuracy is not None:
            found["best_acc"] = self.best_accuracy
        return found

    def table(self) -> pd.DataFrame:
        """A row a concept: ``concept``, and each measure that concepts have, with its error."""
        import pandas as pd

        columns: dict[str, Sequence[object]] = {"concept": list(self.names)}
        for name, measured in self.measurements.items():
            if measured.per_concept is not None:
                # of a concept, the sign matters more than the norm
                key = "ois_excess" if name == "ois" else name
                columns[key] = measured.per_concept.tolist()
                if measured.concept_error is not None:
                    columns[f"{key}_error"] = measured.concept_error.tolist()
        return pd.DataFrame(columns)


def measure_leakage(
    sightings: Sightings,
    splits: Splits,
    names: Sequence[str],
    measures: Sequence[Measure] = DEFAULT,
    seed: int = 0,
    best_accuracy: float | None = None,
) -> LeakageResult:
    """Measure leakage and say what was found.

    Args:
        sightings: Of the model. Where hardly any sample is annotated completely, ``conditional_mi`` and the probe on
            the truth are left out, and a sentence says so.
        splits: Of its samples. Those that are never judged serve for fitting probes alone. Impurities, which cost
            most, are measured on the folds of the first repeat.
        names: Of the concepts.
        measures: Which measures to take.
        seed: Of all draws.
        best_accuracy: The best label accuracy that the true concepts allow, where it is known.

    Raises:
        ValueError: A measure is unknown, or the sightings lack what it needs.
    """
    sightings = sightings.settled()
    evidence, correct = sightings.evidence, sightings.correct
    judged = splits.judge.any(1).any(0)
    seen = sightings.rows(judged)
    found: dict[str, Measurement] = {}
    complete = evidence.complete
    of_complete = splits.rows(complete)
    enough = all(bool(part.any(-1).all()) for part in of_complete)
    probe: TruthProbe | None = None
    if enough and {"conditional_mi", "head_on_truth"} & set(measures):
        probe = TruthProbe(evidence.rows(complete), of_complete, seed)
    for measure in measures:
        match measure:
            case "ctl":
                found[measure] = concept_task_leakage(seen.evidence, seed=seed)
            case "icl":
                found[measure] = inter_concept_leakage(seen.evidence, seed=seed)
            case "conditional_mi":
                if enough:
                    found[measure] = conditional_information(evidence, splits, seed, probe=probe)
            case "head_on_truth":
                found[measure] = head_on_truth(seen.correct, _needed(seen.correct_on_truth, measure))
                if probe is not None:
                    found["ceiling"] = ceiling_gap(evidence, splits, correct, seed, probe)
            case "ois":
                found[measure] = oracle_impurity_score(evidence, splits.few(), seed)
            case "nis":
                found[measure] = niche_impurity_score(evidence, splits.few(), seed)
            case "completeness":
                features = _needed(sightings.features, measure)
                found[measure] = completeness_score(evidence, splits, correct, features, seed)
            case _:
                raise ValueError(f"measures: expected any of {list(MEASURES)}, got {measure!r}")
    sentences = findings(found, names, float(seen.correct.mean()), int(judged.sum()), best_accuracy)
    if "conditional_mi" in measures and not enough:
        sentences.append(
            f"Label information beyond the true concepts could not be measured: of {len(evidence)} samples "
            f"{int(complete.sum())} are annotated completely."
        )
    return LeakageResult(found, names, int(judged.sum()), best_accuracy, sentences)


def _needed(given: Tensor | None, measure: str) -> Tensor:
    if given is None:
        raise ValueError(f"measures: {measure!r} needs what this model does not give; leave it out")
    return given

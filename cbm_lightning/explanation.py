"""Why a class was predicted, as a table of named concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cbm_lightning.types import Batch, Contributions, Prediction

if TYPE_CHECKING:
    import pandas as pd

    from cbm_lightning.module import CBMModule


def explain_prediction(model: CBMModule, prediction: Prediction, batch: Batch, top_k: int) -> pd.DataFrame:
    """The concepts that weigh most in each prediction, largest contribution first.

    Args:
        model: The model that made the prediction.
        prediction: Of ``B`` samples.
        batch: What it was made from; annotations are shown if it has them.
        top_k: Concepts a sample, by the size of their contribution.

    Returns:
        A row a sample and concept: ``sample``, ``predicted`` class and its ``probability``, ``concept``,
        ``concept_probability``, ``annotation`` (if known), and ``contribution`` to the logit of the predicted class (of
        class 1 for a binary label, whichever is predicted). The rows in angle brackets (``<bias>``,
        ``<other concepts>``, ...) complete the sum: all contributions of a sample add up to the logit.

    Raises:
        ValueError: The head is not additive, the label is multilabel, or ``top_k`` is below 1.
    """
    import pandas as pd

    account = model.head.contributions(prediction.concepts)
    if account is None or model.task == "multilabel":
        raise ValueError(f"{type(model.head).__name__} with a {model.task} label has no exact contributions to explain")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    probs = model.probabilities(prediction.logits)
    rows: list[dict[str, Any]] = []
    for sample in range(len(probs)):
        if model.task == "multiclass":
            row = label = int(probs[sample].argmax())
            confidence = float(probs[sample, label])
        else:
            row, label = 0, int(probs[sample, 0] >= 0.5)
            confidence = float(probs[sample, 0]) if label else 1.0 - float(probs[sample, 0])
        name = label if model.class_names is None else model.class_names[label]
        head = {"sample": sample, "predicted": name, "probability": confidence}
        rows += [{**head, **line} for line in _lines(model, prediction, batch, account, sample, row, top_k)]
    return pd.DataFrame(rows)


def answers(model: CBMModule, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
    """A prediction as plain tensors, as `CBMModule.predict_step` returns it.

    Args:
        model: The model that made the prediction.
        prediction: Of ``B`` samples.
        batch: What it was made from.

    Returns:
        ``label [B]`` (``[B, L]`` of 0/1 for several labels), ``label_probs [B, L]``, ``concept_probs [B, K]``, and with
        an additive head ``contributions [B, K]`` to the logit of the predicted class (of class 1 for a binary label;
        not for several labels). ``concept_uncertainty [B, K]`` and ``label_uncertainty [B]`` where the model estimates
        them, ``index [B]`` if the batch brings it.
    """
    logits, output = prediction
    probs = model.probabilities(logits)
    label = probs.argmax(-1) if model.task == "multiclass" else (probs >= 0.5).long()
    label = label.squeeze(-1) if model.task == "binary" else label
    result = {"label": label, "label_probs": probs, "concept_probs": output.probs}
    if model.task != "multilabel" and (account := model.head.contributions(output)) is not None:
        row = label if model.task == "multiclass" else torch.zeros_like(label)
        result["contributions"] = account.concepts[torch.arange(len(label), device=label.device), row]
    doubts = {"concept_uncertainty": output.uncertainty, "label_uncertainty": model.head.uncertainty(output)}
    result |= {name: doubt for name, doubt in doubts.items() if doubt is not None}
    return result | ({"index": batch["index"]} if "index" in batch else {})


def prediction_table(model: CBMModule, predictions: Sequence[Any]) -> pd.DataFrame:
    """What `CBMModule.predict_step` returned for all batches, a row a sample.

    Args:
        model: The model that predicted.
        predictions: A dict of tensors a batch.

    Returns:
        ``index`` if the batches brought it, ``predicted`` class (not for several labels), ``probability: CLASS`` of
        each class, ``concept: NAME`` of each concept, and where the model estimates them ``uncertainty`` of the label
        and ``uncertainty: NAME`` of each concept.
    """
    import pandas as pd

    columns = {name: torch.cat([batch[name] for batch in predictions]).cpu() for name in predictions[0]}
    names = model.class_names or [str(label) for label in range(model.num_classes)]
    outputs = [names[1]] if model.task == "binary" else names
    table: dict[str, Any] = {"index": columns["index"].tolist()} if "index" in columns else {}
    if model.task != "multilabel":
        table["predicted"] = [names[label] for label in columns["label"].tolist()]
    table |= {f"probability: {name}": columns["label_probs"][:, i].tolist() for i, name in enumerate(outputs)}
    table |= {f"concept: {name}": columns["concept_probs"][:, k].tolist() for k, name in enumerate(model.concept_set)}
    if "label_uncertainty" in columns:
        table["uncertainty"] = columns["label_uncertainty"].tolist()
    if (doubt := columns.get("concept_uncertainty")) is not None:
        table |= {f"uncertainty: {name}": doubt[:, k].tolist() for k, name in enumerate(model.concept_set)}
    return pd.DataFrame(table)


def _lines(
    model: CBMModule,
    prediction: Prediction,
    batch: Batch,
    account: Contributions,
    sample: int,
    row: int,
    top_k: int,
) -> list[dict[str, Any]]:
    each = account.concepts[sample, row]
    order = each.abs().argsort(descending=True)
    lines = []
    for k in order[:top_k].tolist():
        line = {
            "concept": model.concept_set.names[k],
            "concept_probability": float(prediction.concepts.probs[sample, k]),
        }
        if "concepts" in batch:
            line["annotation"] = float(batch["concepts"][sample, k])
        lines.append({**line, "contribution": float(each[k])})
    rest = {"other concepts": each[order[top_k:]].sum()} if len(order) > top_k else {}
    rest |= {name: torch.as_tensor(part[sample, row]) for name, part in account.other.items()}
    return lines + [{"concept": f"<{name}>", "contribution": float(part)} for name, part in rest.items()]

"""The concepts that each class rests on, as a table, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from cbm_lightning.sparsity.nec import THRESHOLD, kept

if TYPE_CHECKING:
    import pandas as pd

STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.35em .8em;"
    "border-bottom:1px solid #ddd;text-align:left;vertical-align:top}span{display:inline-block;margin:.1em .3em .1em 0;"
    "padding:.1em .5em;border-radius:.7em}.for{background:#d7e8f5}.against{background:#f8dccb}"
)


def kept_concepts(
    weight: Tensor, concepts: Sequence[str], classes: Sequence[str], threshold: float = THRESHOLD
) -> pd.DataFrame:
    """The concepts that each class rests on, the largest weight first.

    Args:
        weight: ``[L, K]``, or ``[L, K, m]`` for concepts of ``m`` numbers, whose weight is their 2-norm.
        concepts: ``K`` names.
        classes: ``L`` names.
        threshold: See `nec.kept`.

    Returns:
        A row a class and concept: ``class``, ``concept`` and ``weight``. A class that rests on nothing has a row with
        an empty concept and weight 0.

    Raises:
        ValueError: The names do not fit the weights.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[0.0, 2.0], [1.0, -3.0]])
        >>> kept_concepts(weight, ["red", "round"], ["apple", "brick"])["concept"].tolist()
        ['round', 'round', 'red']
    """
    import pandas as pd

    if len(concepts) != weight.shape[1] or len(classes) != len(weight):
        raise ValueError(
            f"concepts, classes: expected {weight.shape[1]} and {len(weight)} names, got {len(concepts)} and "
            f"{len(classes)}"
        )
    weight = weight.detach()
    size = weight if weight.ndim == 2 else weight.norm(dim=2)
    used = kept(weight, threshold)
    rows: list[dict[str, str | float]] = []
    for label, shared in enumerate(classes):
        name = shared if list(classes).count(shared) == 1 else f"{shared} ({label})"
        order = [k for k in size[label].abs().argsort(descending=True, stable=True).tolist() if used[label, k]]
        rows += [{"class": name, "concept": concepts[k], "weight": float(size[label, k])} for k in order]
        if not order:
            rows.append({"class": name, "concept": "", "weight": 0.0})
    return pd.DataFrame(rows, columns=["class", "concept", "weight"])


def as_text(table: pd.DataFrame) -> str:
    """A line a class: ``apple: +2.00 round, -1.00 wet``; arguments as `kept_concepts` returns them."""
    lines = []
    for name, rows in table.groupby("class", sort=False):
        parts = [f"{w:+.2f} {c}" for c, w in zip(rows["concept"], rows["weight"], strict=True) if c]
        lines.append(f"{name}: {', '.join(parts) or '(no concept)'}")
    return "\n".join(lines)


def as_html(table: pd.DataFrame, title: str) -> str:
    """A page of its own, a row a class: what speaks for it in blue, against it in orange."""
    rows = []
    for name, group in table.groupby("class", sort=False):
        chips = [
            f'<span class="{"for" if w > 0 else "against"}">{escape(c)} {w:+.2f}</span>'
            for c, w in zip(group["concept"], group["weight"], strict=True)
            if c
        ]
        rows.append(f"<tr><th>{escape(str(name))}</th><td>{''.join(chips) or '(no concept)'}</td></tr>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><table><tr><th>class</th><th>concepts</th></tr>{''.join(rows)}</table></html>\n"
    )

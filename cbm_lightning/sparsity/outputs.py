"""From the rows of a fitted classifier to those of a label head."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_rows(
    coef: Tensor, intercept: Tensor, classes: Tensor, outputs: int, values: Tensor, distributed: bool = False
) -> tuple[Tensor, Tensor]:
    """Weights and biases with a row for each logit of a head, whatever classes the samples had.

    One logit for two classes becomes two that differ by it, and two become one. A class without a sample gets no
    weights, and as bias the lowest logit that any sample gives any other class.

    Args:
        coef: ``[R, V]`` as fitted.
        intercept: ``[R]``.
        classes: The label of each row, where there is a row a class.
        outputs: Logits of the head.
        values: ``[n, V]`` samples it was fitted on.
        distributed: Whether each process brings samples of its own.

    Example:
        >>> fill_rows(torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([0, 1]), 2, torch.zeros(1, 1))
        (tensor([[-1.],
                [ 1.]]), tensor([-0.5000,  0.5000]))
    """
    coef, intercept, classes = coef.to(values), intercept.to(values), classes.to(values.device)
    if len(coef) == 1 and outputs == 2:
        return torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
    if len(coef) == 1 and outputs > 2:
        # two classes of more were seen
        coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
    if len(coef) == 2 and outputs == 1:
        return coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    if len(coef) == outputs:
        return coef, intercept
    lowest = (values @ coef.T + intercept).min()
    if distributed:
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    weight, bias = coef.new_zeros(outputs, coef.shape[1]), lowest.expand(outputs).clone()
    weight[classes], bias[classes] = coef, intercept
    return weight, bias

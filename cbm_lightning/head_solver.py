"""A phase without gradients: one pass over the training data, then a head that an estimator fits exactly."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from cbm_lightning.configurable import plain
from cbm_lightning.labels import Task
from cbm_lightning.optimization import ClassSpec, resolve
from cbm_lightning.sparsity.nec import Sparsity
from cbm_lightning.sparsity.outputs import fill_rows
from cbm_lightning.types import ConceptOutput

if TYPE_CHECKING:
    from cbm_lightning.concepts import ConceptSet
    from cbm_lightning.heads import LabelHead


def solver_spec(given: Any) -> dict[str, Any]:
    """The plain form ``{"class_path": ..., "init_args": ...}`` of an estimator, checked by making it.

    Args:
        given: An estimator in scikit-learn's conventions, its class path, or ``{"class_path": ..., "init_args": ...}``.
            YAML files must give the whole path (``cbm_lightning.sparsity.ElasticNetPath``).

    Raises:
        ValueError: There is no such class, or an argument is unknown, out of range or no plain value.
    """
    if isinstance(given, str):
        spec: dict[str, Any] = {"class_path": given, "init_args": {}}
    elif isinstance(given, Mapping):
        spec = dict(given)
    elif isinstance(given, type) or not hasattr(given, "get_params"):
        raise ValueError(f"solver: expected an estimator, such as ElasticNetPath(nec=5), got {given!r}")
    else:
        defaults = inspect.signature(type(given)).parameters
        chosen = {name: _plain(value) for name, value in given.get_params(deep=False).items()}
        chosen = {name: value for name, value in chosen.items() if value != defaults[name].default}
        spec = {"class_path": f"{type(given).__module__}.{type(given).__qualname__}", "init_args": chosen}
    spec["init_args"] = {name: _plain(value) for name, value in (spec.get("init_args") or {}).items()}
    make_solver(spec)
    return spec


def _plain(value: Any) -> Any:
    """A value as a checkpoint can hold it: NumPy's numbers and arrays as numbers and lists."""
    if isinstance(value, dict):
        # the keys of class weights are labels, and stay numbers
        return {key: _plain(item) for key, item in value.items()}
    try:
        return plain(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError as error:
        raise ValueError(f"solver: {error}") from None


def make_solver(spec: ClassSpec) -> Any:
    """An estimator from its plain form; errors as in `solver_spec`."""
    from sklearn.base import BaseEstimator

    from cbm_lightning.sparsity import elastic_net_path

    cls, init_args = resolve(spec, elastic_net_path, BaseEstimator, "solver")
    return cls(**init_args)


def solver_device(device: torch.device) -> str:
    """Where to solve for a model on a device: there, unless it knows no double precision."""
    return "cpu" if device.type == "mps" else str(device)


class HeadSolver:
    """Collects what a head reads in one epoch, and fits the head on it.

    Args:
        spec: Of the estimator. `ElasticNetPath` runs on the device of the model, with the samples where they are;
            others get the samples of all processes.
        head: Takes the weights over.
        concepts: For messages.
        task: What the label is.

    Raises:
        ValueError: The head takes no weights, the estimator fits biases for a head that has none, or the estimator
            cannot work with so many concepts or with such labels.
    """

    def __init__(self, spec: dict[str, Any], head: LabelHead, concepts: ConceptSet, task: Task) -> None:
        self.estimator = make_solver(spec)
        self.head, self.concepts, self.task = head, concepts, task
        self._values: list[Tensor] = []
        self._labels: list[Tensor] = []
        head.check_solver(self.estimator.get_params())
        if hasattr(self.estimator, "check_problem"):
            self.estimator.check_problem(head.layout.concepts, task == "multilabel")
        else:
            self._rehearse()

    def _rehearse(self) -> None:
        """Fit a copy to a few drawn samples: not every classifier is linear, or takes these labels."""
        from sklearn.base import clone

        generator = torch.Generator().manual_seed(0)
        values = torch.randn(24, self.head.layout.size, generator=generator, dtype=torch.float64)
        labels = torch.arange(24) % 2
        drawn = torch.stack([labels, 1 - labels], 1) if self.task == "multilabel" else labels
        kind = type(self.estimator).__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = clone(self.estimator).fit(values.numpy(), drawn.numpy())
            except Exception as error:
                raise ValueError(f"solver: {kind} cannot fit a {self.task} label: {error}") from error
        if missing := [name for name in ("coef_", "intercept_", "classes_") if not hasattr(made, name)]:
            raise ValueError(f"solver: expected a linear classifier, {kind} has no {missing} when it is fitted")

    def take(self, output: ConceptOutput, label: Tensor, batch_idx: int) -> None:
        """Keep what the head reads of a batch.

        Raises:
            ValueError: The epoch did not begin with this process, or the values have an axis of samples or time, over
                which no linear classifier is fitted.
        """
        if not self._values and batch_idx > 0:
            raise ValueError(
                f"a phase with a solver cannot be resumed at batch {batch_idx} of its epoch, for the samples before it "
                "are gone; resume from the checkpoint at the end of the epoch before"
            )
        if output.values.ndim != 2 or output.label_logits is not None:
            raise ValueError(
                f"solver: expected values [B, V] that the head alone turns into logits, got {list(output.values.shape)}"
                f" of axes (samples {output.sample_dim}, time {output.time_dim}); train this head by gradients"
            )
        self._values.append(output.values.detach().float().cpu())
        self._labels.append(label.detach().cpu() if self.task == "multilabel" else label.detach().view(-1).long().cpu())

    def fit(self, device: torch.device, world_size: int) -> None:
        """Fit the estimator on all that was taken, and hand its weights to the head."""
        values, labels = torch.cat(self._values), torch.cat(self._labels)
        self._values, self._labels = [], []
        accepted = self.estimator.get_params()
        own: dict[str, Any] = {}
        if "distributed" in accepted:
            own["distributed"] = world_size > 1
        elif world_size > 1:
            values, labels = (torch.cat(gather_all_tensors(x.to(device))).cpu() for x in (values, labels))
        if accepted.get("device", "") is None:
            own["device"] = solver_device(device)
        layout = self.head.layout
        if accepted.get("group_size") == 1 and layout.width > 1 and not layout.extra:
            own["group_size"] = layout.width
        self.estimator.set_params(**own)
        if "distributed" in accepted:
            self.estimator.fit(values, labels, self._names())
        else:
            self.estimator.fit(values.double().numpy(), labels.numpy())
        coef = torch.as_tensor(self.estimator.coef_).float()
        intercept = torch.as_tensor(self.estimator.intercept_).float().expand(len(coef))
        classes = torch.as_tensor(self.estimator.classes_).long()
        weight, bias = fill_rows(
            coef, intercept, classes, self.head.num_outputs, values.to(device), distributed=world_size > 1
        )
        self.head.set_linear(weight, bias)
        found = Sparsity.of(weight[:, : layout.concepts * layout.width].unflatten(1, (layout.concepts, layout.width)))
        rank_zero_info(
            f"{type(self.estimator).__name__} fitted the head on {len(values)} samples: {found.nec:.2f} of "
            f"{layout.concepts} concepts a class, {found.active_concepts} used by any."
        )

    def _names(self) -> list[str]:
        """A name a column, for messages."""
        layout = self.head.layout
        names = [name for name in self.concepts.names for _ in range(layout.width)]
        return names + [f"unsupervised {i}" for i in range(layout.extra)]

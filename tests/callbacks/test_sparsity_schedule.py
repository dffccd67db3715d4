"""The steps of a schedule beside the same steps by hand, and the optimum they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from recorder import Log, make, same, states
from sparsity.problems import objective
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from toy import ToyData, quiet_trainer

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck, Phase
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import SparsitySchedule
from cbm_lightning.sparsity import ElasticNetPath
from cbm_lightning.sparsity.masks import restore_masks

HEAD = "head.linear.weight"
Rows = list[tuple[Tensor, Tensor]]


class Plain(LightningModule):
    """A user's own module: one linear map."""

    def __init__(self, optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(6, 3)
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.linear(x), y)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_masks(self, checkpoint["state_dict"])


def drawn(batches: int, n: int = 16) -> Rows:
    """Batches of a noisy three-class problem that three of six scores tell."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * n, 6, generator=generator)
    y = (x[:, :3] + 0.7 * torch.randn(batches * n, 3, generator=generator)).argmax(1)
    return list(zip(x.split(n), y.split(n), strict=True))


def loader(rows: Any) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=None)


def fit(model: LightningModule, schedule: SparsitySchedule | None, rows: Any, *others: Callback, **options: Any) -> Any:
    callbacks = [*([schedule] if schedule else []), *others]
    trainer = quiet_trainer(callbacks=callbacks, **options)
    if isinstance(rows, ToyData):
        trainer.fit(model, rows)
    else:
        trainer.fit(model, loader(rows), loader(rows[:1]) if isinstance(model, CBMModule) else None)
    return trainer


def soft(w: Tensor, threshold: Any) -> Tensor:
    """The soft threshold, written down once more."""
    return w.sign() * (w.abs() - threshold).clamp(min=0)


WAYS = {
    "constant": lambda way: 1.0,
    "linear": lambda way: way,
    "cosine": lambda way: (1 - math.cos(math.pi * way)) / 2,
}


@pytest.mark.parametrize("mode", WAYS)
def test_sgd_steps_are_those_of_a_hand_written_loop(mode: Any) -> None:
    rows, lr, strength = drawn(20), 0.3, 0.1
    model = Plain(lambda parameters: torch.optim.SGD(parameters, lr=lr))
    w, b = (p.detach().clone().requires_grad_() for p in (model.linear.weight, model.linear.bias))
    schedule = SparsitySchedule("linear.weight", mode=mode, strength=strength, begin=0.2, end=0.6)
    fit(model, schedule, rows)
    for step, (x, y) in enumerate(rows):
        gradient_w, gradient_b = torch.autograd.grad(cross_entropy(x @ w.T + b, y), (w, b))
        fraction = (step + 1) / len(rows)
        rise = 0.0 if fraction < 0.2 else 1.0 if fraction >= 0.6 else WAYS[mode]((fraction - 0.2) / 0.4)
        with torch.no_grad():
            w.copy_(soft(w - lr * gradient_w, lr * strength * rise))
            b.sub_(lr * gradient_b)
    torch.testing.assert_close(model.linear.weight, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.linear.bias, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.linear.weight == 0, w == 0)
    assert 0 < int((w == 0).sum()) < w.numel()


@pytest.mark.parametrize("decay", [None, 0.1])
def test_adam_steps_are_those_of_a_hand_written_loop(decay: float | None) -> None:
    rows, lr, lam, eps = drawn(6), 0.05, 0.08, 1e-8

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if decay is None:
            return torch.optim.Adam(parameters, lr=lr)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)

    model = Plain(optimizer)
    model.linear.bias.requires_grad_(False)
    w, b = model.linear.weight.detach().clone().requires_grad_(), model.linear.bias.detach().clone()
    fit(model, SparsitySchedule("linear.weight", mode="constant", strength=lam, begin=0.0, end=0.0), rows)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (x, y) in enumerate(rows, 1):
        g = torch.autograd.grad(cross_entropy(x @ w.T + b, y), w)[0]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        sizes = lr / ((v / (1 - 0.999**t)).sqrt() + eps)
        with torch.no_grad():
            moved = w * (1 - lr * (decay or 0.0)) - sizes * m / (1 - 0.9**t)
            w.copy_(soft(moved, sizes * lam))
    torch.testing.assert_close(model.linear.weight, w, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.linear.weight == 0, w == 0)
    assert 0 < int((w == 0).sum()) < w.numel()


class Steps(Callback):
    """Weights and gradients before each real step of the optimizer, its rates, and weights after each batch."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.before: list[dict[str, tuple[Tensor, Tensor, float]]] = []
        self.after: list[dict[str, Tensor]] = []
        self.real: list[bool] = []

    def on_before_optimizer_step(self, trainer, model, optimizer) -> None:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        known = {name: model.get_parameter(name) for name in self.names}
        self.before.append(
            {n: (p.detach().clone(), p.grad.clone(), rates[id(p)]) for n, p in known.items() if p.grad is not None}
        )

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self.after.append({name: model.get_parameter(name).detach().clone() for name in self.names})
        self.real.append(len(self.before) > sum(self.real))

    def pairs(self, name: str) -> list[tuple[Tensor, Tensor, float, Tensor]]:
        """Weight, gradient and rate before each real step, and the weight after it."""
        after = [weights for weights, real in zip(self.after, self.real, strict=True) if real]
        return [(*b[name], a[name]) for b, a in zip(self.before, after, strict=True) if name in b]


SGD = {"optimizer": "SGD", "lr": 0.1}
STEP = {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], float, set[float], int]] = {
    # options of model and Trainer, strength, rates of the head, real steps
    "multipliers": ({"lr_multipliers": {"head": 3.0, "backbone": 0.1}}, {}, 0.05, {0.3}, 12),
    "scheduler": ({"lr_scheduler": STEP}, {}, 0.2, {0.1, 0.05}, 12),
    "accumulated": ({}, {"accumulate_grad_batches": 4}, 0.5, {0.1}, 4),
    "mixed precision": ({}, {"precision": "bf16-mixed"}, 0.2, {0.1}, 12),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_real_step_is_followed_by_one_proximal_step_at_the_rate_of_the_group(variant: str) -> None:
    options, run, strength, rates, real = VARIANTS[variant]
    steps = Steps(HEAD)
    model = make(LinearBottleneck("logits"), **{**SGD, **options})
    schedule = SparsitySchedule(mode="constant", strength=strength, begin=0.0, end=0.0)
    fit(model, schedule, ToyData(), steps, max_epochs=2, **run)
    pairs = steps.pairs(HEAD)
    assert len(pairs) == sum(steps.real) == real
    assert {round(rate, 6) for *_, rate, _ in pairs} == rates
    for before, gradient, rate, after in pairs:
        torch.testing.assert_close(after, soft(before - rate * gradient, rate * strength), rtol=1e-5, atol=1e-6)
    assert int((pairs[-1][-1] == 0).sum()) > 0
    # and nothing happens in between
    for i in (i for i, is_real in enumerate(steps.real) if i and not is_real):
        assert torch.equal(steps.after[i][HEAD], steps.after[i - 1][HEAD])


def test_steps_that_the_gradient_scaler_skips_leave_it_out() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-4)
    steps = Steps("linear.weight")
    model = Plain(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    schedule = SparsitySchedule("linear.weight", mode="constant", strength=0.3, begin=0.0, end=0.0)
    rows = drawn(6)
    steps.after.append({"linear.weight": model.linear.weight.detach().clone()})
    fit(model, schedule, rows, steps, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    finite = [bool(before["linear.weight"][1].isfinite().all()) for before in steps.before]
    assert set(finite) == {True, False}
    for i, ((before, gradient, rate), good) in enumerate(
        (found["linear.weight"], good) for found, good in zip(steps.before, finite, strict=True)
    ):
        after = steps.after[i + 1]["linear.weight"]
        if good:
            torch.testing.assert_close(after, soft(before - rate * gradient, rate * 0.3), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(after, before)


def test_a_strength_of_zero_changes_nothing() -> None:
    ends = []
    late = SparsitySchedule(strength=5.0, begin=1.0, end=1.0)
    for schedule in (None, SparsitySchedule(mode="linear", strength=0.0), late):
        torch.manual_seed(1)
        model = make(EmbeddingBottleneck(2))
        fit(model, schedule, ToyData(), max_epochs=2)
        ends.append(states(model))
    assert same(ends[0], ends[1])
    # the last of all steps is a step of the ramp
    assert not same(ends[0], ends[2])


# ---------------------------------------------------------------- the optimum

LAMBDA = 0.03
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.0, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_strength_is_the_lambda_of_the_objective_under_every_optimizer(name: str) -> None:
    (x, y), steps = drawn(1, n=150)[0], 400
    model = Plain(OPTIMIZERS[name])
    schedule = SparsitySchedule("linear.weight", mode="constant", strength=LAMBDA, begin=0.0, end=0.0)
    fit(model, schedule, [(x, y)] * steps)
    exact = ElasticNetPath(lambdas=LAMBDA, alpha=1.0, standardize=False, dtype="float64", tol=1e-8).fit(x, y)
    weight, bias = model.linear.weight.detach().numpy(), model.linear.bias.detach().numpy()
    best, found = (
        objective(*weights, x.numpy(), y.numpy(), LAMBDA, 1.0)
        for weights in ((exact.coef_, exact.intercept_), (weight, bias))
    )
    assert best - 1e-7 <= found <= best + 1e-3
    assert 0 < int((exact.coef_ == 0).sum()) < 18
    # other zeros than those of the optimum only where a weight is next to nothing
    differ = (weight == 0) != (exact.coef_ == 0)
    assert abs(weight[differ]).max(initial=0.0) + abs(exact.coef_[differ]).max(initial=0.0) < 0.05


@pytest.mark.parametrize("penalty", ["l1", "group"])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_the_head_of_a_frozen_model_reaches_the_sparse_optimum(penalty: Any, alpha: float) -> None:
    torch.manual_seed(2)
    (x, y), lam = drawn(1, n=150)[0], 0.05
    phases = [Phase("head", train=["head"], loss_weights={"concept": 0.0})]
    model = CBMModule(
        Identity(6), LinearBottleneck("logits"), concepts=5, num_classes=3, phases=phases, optimizer="SGD", lr=0.3
    )
    with torch.no_grad():
        values = model(x).concepts.values
    batch = {"embedding": x, "concepts": torch.full((150, 5), torch.nan), "label": y}
    schedule = SparsitySchedule(mode="constant", strength=lam, penalty=penalty, alpha=alpha, begin=0.0, end=0.0)
    fit(model, schedule, [batch] * 400)
    options = {"penalty": penalty, "alpha": alpha, "standardize": False, "dtype": "float64", "tol": 1e-8}
    exact = ElasticNetPath(lambdas=lam, **options).fit(values, y)
    group = penalty == "group"
    best, found = (
        objective(*weights, values.numpy(), y.numpy(), lam, alpha, group=group)
        for weights in (
            (exact.coef_, exact.intercept_),
            (model.head.linear.weight.detach().numpy(), model.head.linear.bias.detach().numpy()),
        )
    )
    assert best - 1e-6 <= found <= best + 1e-3
    assert 0 < int((exact.coef_ == 0).sum()) < 15


def test_a_phase_that_freezes_a_parameter_leaves_it_alone() -> None:
    phases = [Phase("concepts", train=["backbone", "bottleneck"], epochs=2, loss_weights={"label": 0.0}), Phase("all")]
    steps = Steps(HEAD, "bottleneck.scores.weight")
    schedule = SparsitySchedule([HEAD, "bottleneck.*.weight"], mode="constant", strength=0.05, begin=0.0, end=0.0)
    model = make(phases=phases, **SGD)
    before = model.head.linear.weight.detach().clone()
    log = Log()
    fit(model, schedule, ToyData(), steps, max_epochs=4, logger=log)
    assert all(torch.equal(weights[HEAD], before) for weights in steps.after[:12])
    for name, first in (("bottleneck.scores.weight", 24), (HEAD, 12)):
        pairs = steps.pairs(name)
        assert len(pairs) == first
        for weight, gradient, rate, after in pairs:
            torch.testing.assert_close(after, soft(weight - rate * gradient, rate * 0.05), rtol=1e-5, atol=1e-6)
    keys = {key for row in log.rows for key in row if "sparsity" in key}
    names = [HEAD, "bottleneck.scores.weight"]
    assert keys == {f"train/sparsity/{n}/{k}" for n in names for k in ("nec", "density")} | {"train/sparsity/lambda"}

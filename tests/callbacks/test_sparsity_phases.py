"""Schedules, masks and solvers beside phases, and what a reading of them found."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import STEPS, make
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Lasso
from toy import ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule, LinearBottleneck, Phase
from cbm_lightning.callbacks import SparsitySchedule
from cbm_lightning.sparsity import ElasticNetPath
from cbm_lightning.sparsity.masks import mask_of

HEAD = "head.linear.weight"
SOLVER = {"class_path": "cbm_lightning.sparsity.ElasticNetPath", "init_args": {"nec": 2}}


class Counts(Callback):
    """Non-zero weights of the head after each step."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self.found.append(int((model.head.linear.weight != 0).sum()))


def fit(model: CBMModule, *callbacks: Callback, **options) -> CBMModule:
    options = {"max_epochs": 8, "limit_val_batches": 0, **options}
    quiet_trainer(callbacks=list(callbacks), **options).fit(model, ToyData())
    return model


def test_shares_are_those_of_the_phase_that_trains_the_head() -> None:
    counts = Counts()
    schedule = SparsitySchedule(mode="cubic", target_nec=1, begin=0.25, end=0.75)
    fit(make(phases="sequential"), schedule, counts)
    # the head trains in the last four of eight epochs, a quarter of which is warm-up and a quarter hold
    first = 4 * STEPS
    assert counts.found[: first + STEPS - 1] == [12] * (first + STEPS - 1)
    assert 3 < counts.found[first + 2 * STEPS - 1] < 12
    assert counts.found[-STEPS:] == [3] * STEPS


def test_a_dry_run_ends_before_the_phase_of_the_head() -> None:
    model = make(phases="sequential")
    quiet_trainer(fast_dev_run=True, callbacks=[SparsitySchedule(mode="cubic", target_nec=1)]).fit(model, ToyData())
    assert bool(model.head.linear.weight.all())


def test_a_feature_that_is_always_zero_does_not_take_its_concepts_along() -> None:
    model = make(LinearBottleneck("logits"), ToyBackbone(), optimizer="AdamW", lr=0.01)
    with torch.no_grad():
        model.backbone.layers[1].weight[0], model.backbone.layers[1].bias[0] = 0.0, -1.0
    model.backbone.layers[1].requires_grad_(False)
    schedule = SparsitySchedule("bottleneck.scores.weight", "constant", 1e-5, "group", group_dim=0, begin=0.0)
    fit(model, schedule, max_epochs=3)
    assert bool(model.bottleneck.scores.weight[:, 1:].any(1).all())


@pytest.mark.parametrize("monitor", ["val/loss", "val/concept_acc"])
def test_the_best_checkpoint_may_be_from_before_the_solver(monitor: str, tmp_path: Path) -> None:
    model = make(phases=[Phase("joint"), Phase("sparse_head", train=["head"], solver=SOLVER)])
    with pytest.raises(ValueError, match="may be from before the solver of phase 'sparse_head'; monitor nothing"):
        fit(
            model,
            ModelCheckpoint(tmp_path, monitor=monitor),
            max_epochs=2,
            limit_val_batches=1,
            enable_checkpointing=True,
        )


def test_masks_follow_what_a_solver_has_fitted() -> None:
    phases = [Phase("joint", epochs=4), Phase("sparse_head", train=["head"], solver=ElasticNetPath(nec=2))]
    counts = Counts()
    model = fit(make(phases=phases), SparsitySchedule(mode="cubic", target_nec=1), counts, max_epochs=5)
    assert counts.found[-1] == 3, "what the schedule had left until the solver came"
    assert int((model.head.linear.weight != 0).sum()) == 6
    assert torch.equal(mask_of(model, HEAD) == 0, model.head.linear.weight == 0)


def test_the_weights_of_a_pruned_model_load_into_a_fresh_one() -> None:
    pruned = fit(make(), SparsitySchedule(mode="cubic", target_nec=1), max_epochs=2)
    fresh = make()
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh.head.linear.weight, pruned.head.linear.weight)
    fit(fresh, max_epochs=1)
    assert int((fresh.head.linear.weight != 0).sum()) == 3
    # and those of one that was never pruned into a pruned one
    pruned.load_state_dict(make().state_dict())
    assert bool(mask_of(pruned, HEAD).all())


@pytest.mark.parametrize("solver", [RandomForestClassifier(2), Lasso()])
def test_a_solver_that_cannot_become_a_head_is_refused_before_training(solver) -> None:
    model = make(phases=[Phase("joint"), Phase("sparse_head", train=["head"], solver=solver)])
    with pytest.raises(ValueError, match=f"solver: .*{type(solver).__name__}"):
        fit(model, max_epochs=2)
    assert model.global_step == 0


# ---------------------------------------------------------------- the path


@pytest.mark.parametrize(("positives", "excess"), [(20, 1e-2), (100, 1e-3)])
def test_rare_classes_are_solved_as_exactly_as_others_until_rounding_counts(positives: int, excess: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8000, 20, generator=generator)
    y = torch.zeros(8000, dtype=torch.long)
    y[(x[:, 0] + x[:, 1]).topk(positives).indices] = 1
    ours = ElasticNetPath(n_lambdas=8).fit(x, y)
    exact = ElasticNetPath([s.lam for s in ours.path_], dtype="float64", tol=1e-9, max_iter=5000).fit(x, y)
    for found, best in zip(ours.path_, exact.path_, strict=True):
        assert found.objective <= best.objective * (1 + excess)


def test_a_ridge_alone_has_no_number_of_concepts() -> None:
    with pytest.raises(ValueError, match="alpha: a ridge alone leaves no weight at zero"):
        ElasticNetPath(nec=2, alpha=0.0)
    with pytest.raises(ValueError, match="nec, max_nec: expected one of them"):
        ElasticNetPath(nec=2, max_nec=5)


@pytest.mark.parametrize("factor", [1e15, 1e-15])
def test_units_of_the_scores_do_not_matter(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    y = (x[:, 2] - x[:, 4] > 0).long()
    plain, scaled = (ElasticNetPath(0.05).fit(z, y) for z in (x, x * factor))
    assert np.count_nonzero(scaled.coef_) == np.count_nonzero(plain.coef_) > 0
    torch.testing.assert_close(scaled.solution_.weight, plain.solution_.weight, atol=1e-4, rtol=1e-3)


def test_numbers_are_no_classes() -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="continuous"):
        ElasticNetPath(0.05).fit(x, x[:, 0])
    column = ElasticNetPath(0.05).fit(x, (x[:, :1] > 0).long())
    assert column.coef_.shape == (2, 4)
    assert math.isfinite(column.solution_.objective)

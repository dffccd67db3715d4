"""What each mode of a schedule leaves: how many weights, which groups, and what of it is logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from recorder import STEPS, Log, make
from torch import Tensor
from toy import CONCEPTS, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck, MLPHead, ResidualHead
from cbm_lightning.callbacks import SparsitySchedule

HEAD = "head.linear.weight"
EPOCHS = 5
TOTAL = EPOCHS * STEPS


class Watch(Callback):
    """The parameter after each step."""

    def __init__(self, name: str = HEAD) -> None:
        self.name, self.weights = name, list[Tensor]()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self.weights.append(model.get_parameter(self.name).detach().clone())

    @property
    def alive(self) -> list[Tensor]:
        return [weight != 0 for weight in self.weights]

    @property
    def counts(self) -> list[int]:
        return [int(alive.sum()) for alive in self.alive]


def train(schedule: SparsitySchedule, model: CBMModule | None = None, watch: str = HEAD, **options: Any) -> Watch:
    watcher = Watch(watch)
    callbacks = [schedule, watcher, *options.pop("callbacks", [])]
    model = make(LinearBottleneck("logits"), lr=0.05) if model is None else model
    options = {"max_epochs": EPOCHS, "limit_val_batches": 0, **options}
    quiet_trainer(callbacks=callbacks, **options).fit(model, ToyData())
    return watcher


@pytest.mark.parametrize("mode", ["constant", "linear", "cosine"])
def test_warm_up_ramp_and_hold(mode: Any) -> None:
    log = Log()
    schedule = SparsitySchedule(mode=mode, strength=0.4, begin=0.4, end=0.8)
    watch = train(schedule, logger=log)
    assert watch.counts[: int(0.4 * TOTAL) - 1] == [12] * 11
    assert watch.counts[-1] < 12
    logged = [row["train/sparsity/lambda"] for row in log.rows if "train/sparsity/lambda" in row]
    expected = {"constant": [0, 1, 1, 1, 1], "linear": [0, 0, 0.5, 1, 1], "cosine": [0, 0, 0.5, 1, 1]}[mode]
    assert logged == pytest.approx([0.4 * way for way in expected])


def test_what_is_logged_is_what_the_weights_are() -> None:
    log = Log()
    watch = train(SparsitySchedule(mode="constant", strength=0.3, begin=0.0, end=0.0), logger=log)
    rows = [row for row in log.rows if "train/sparsity/nec" in row]
    at_epoch_ends = watch.counts[STEPS - 1 :: STEPS]
    assert [row["train/sparsity/nec"] for row in rows] == pytest.approx([count / 3 for count in at_epoch_ends])
    assert [row["train/sparsity/density"] for row in rows] == pytest.approx([count / 12 for count in at_epoch_ends])
    assert len(set(at_epoch_ends)) > 1


@pytest.mark.parametrize("target", [1.0, 4 / 3, 2.0, 4.0])
@pytest.mark.parametrize("every", [1, 4])
def test_cubic_follows_zhu_and_gupta_to_the_target(target: float, every: int) -> None:
    watch = train(SparsitySchedule(mode="cubic", target_nec=target, begin=0.2, end=0.7, every_n_steps=every))
    for step, count in enumerate(watch.counts, 1):
        fraction = step // every * every / TOTAL
        way = min(max((fraction - 0.2) / 0.5, 0.0), 1.0)
        nec = target + (CONCEPTS - target) * (1 - way) ** 3
        assert count == round(nec * 3), step
    for before, after in zip(watch.alive[:-1], watch.alive[1:], strict=True):
        assert not (after & ~before).any()  # what is pruned stays so
    assert watch.counts[-1] == round(3 * target)


def test_cubic_reaches_the_target_though_its_last_turn_comes_before_the_end_of_the_ramp() -> None:
    # the only turn is at step 16 of 30, and the ramp ends at 27
    watch = train(SparsitySchedule(mode="cubic", target_nec=1, begin=0.0, end=0.9, every_n_steps=16))
    assert watch.counts[-1] == 3


def test_cubic_prunes_the_smallest_weights() -> None:
    model = make(LinearBottleneck("logits"), optimizer="SGD", lr=1e-4)
    largest = model.head.linear.weight.detach().abs().flatten().topk(6).indices
    watch = train(SparsitySchedule(mode="cubic", target_nec=2, begin=0.0, end=0.5), model)
    assert sorted(watch.alive[-1].flatten().nonzero().flatten().tolist()) == sorted(largest.tolist())


@pytest.mark.parametrize("target", [1.0, 5 / 3])
@pytest.mark.parametrize("mode", ["constant", "linear", "cosine", "adaptive"])
def test_the_target_is_met_when_finetuning_begins_and_only_kept_weights_move_then(mode: Any, target: float) -> None:
    schedule = SparsitySchedule(mode=mode, strength=0.05, begin=0.0, end=0.5, finetune=0.3, target_nec=target)
    watch = train(schedule)
    start = round(0.7 * TOTAL)
    # even where the controller has gone below its target for a step
    assert watch.counts[start:] == [round(3 * target)] * (TOTAL - start)
    assert all(torch.equal(alive, watch.alive[-1]) for alive in watch.alive[start:])
    kept = watch.alive[-1]
    for before, after in zip(watch.weights[start:-1], watch.weights[start + 1 :], strict=True):
        assert (before[kept] != after[kept]).all()


def test_finetuning_without_a_target_keeps_the_zeros_of_the_ramp_and_no_others() -> None:
    watch = train(SparsitySchedule(mode="linear", strength=0.2, begin=0.0, end=0.6, finetune=0.4))
    start = round(0.6 * TOTAL)
    assert 0 < watch.counts[start - 1] < 12
    assert all(torch.equal(alive, watch.alive[start - 1]) for alive in watch.alive[start:])
    # without the penalty the kept weights grow again
    size = [float(weight.abs().sum()) for weight in watch.weights]
    assert size[-1] > size[start - 1]


def test_zeros_within_a_concept_stay_too() -> None:
    model = make(EmbeddingBottleneck(3, randint=0.0), lr=0.05)
    watch = train(SparsitySchedule(mode="constant", strength=0.05, begin=0.0, end=0.0, finetune=0.5), model)
    start = TOTAL // 2
    assert 0 < watch.counts[start - 1] < 36
    assert all(torch.equal(alive, watch.alive[start - 1]) for alive in watch.alive[start:])


def test_adaptive_finds_the_strength_for_its_target() -> None:
    found = {}
    for strength in (2e-3, 0.5):
        log = Log()
        schedule = SparsitySchedule(mode="adaptive", strength=strength, target_nec=2, begin=0.05, end=0.8)
        watch = train(schedule, make(LinearBottleneck("logits"), lr=0.02), max_epochs=25, logger=log)
        found[strength] = sum(watch.counts[-30:]) / 30 / 3
        lambdas = [row["train/sparsity/lambda"] for row in log.rows if "train/sparsity/lambda" in row]
        assert len(set(lambdas)) > 10
    assert found == pytest.approx(dict.fromkeys(found, 2.0), abs=0.35)


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_concept_goes_for_all_classes_at_once(optimizer: str) -> None:
    lr = 0.3 if optimizer == "SGD" else 0.02
    model = make(LinearBottleneck("logits"), optimizer=optimizer, lr=lr)
    watch = train(SparsitySchedule(mode="linear", penalty="group", strength=0.25, begin=0.0, end=0.5), model)
    columns = watch.alive[-1].sum(0)
    assert set(columns.tolist()) == {0, 3}


def test_the_rows_of_a_bottleneck() -> None:
    name = "bottleneck.scores.weight"
    schedule = SparsitySchedule(name, "constant", 0.2, penalty="group", group_dim=0, begin=0.0, end=0.0)
    model = make(LinearBottleneck("logits"), optimizer="SGD", lr=0.3)
    watch = train(schedule, model, name)
    rows = watch.alive[-1].sum(1).tolist()
    assert set(rows) == {0, 8}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_all_numbers_of_an_embedding_go_together(optimizer: str) -> None:
    model = make(EmbeddingBottleneck(3, randint=0.0), optimizer=optimizer, lr=0.3 if optimizer == "SGD" else 0.02)
    watch = train(SparsitySchedule(mode="linear", penalty="group", strength=0.1, begin=0.0, end=0.5), model)
    blocks = watch.alive[-1].view(3, 4, 3).sum((0, 2))
    assert set(blocks.tolist()) == {0, 9}


def test_a_group_step_is_that_of_a_hand_written_one() -> None:
    model = make(EmbeddingBottleneck(3, randint=0.0), optimizer="SGD", lr=0.1)
    gradients: list[tuple[Tensor, Tensor]] = []

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, model, optimizer) -> None:
            weight = model.head.linear.weight
            gradients.append((weight.detach().clone(), weight.grad.clone()))

    schedule = SparsitySchedule(mode="constant", penalty="group", alpha=0.8, strength=0.3, begin=0.0, end=0.0)
    watch = train(schedule, model, max_epochs=2, callbacks=[Keep()])
    for (before, gradient), after in zip(gradients, watch.weights, strict=True):
        blocks = (before - 0.1 * gradient).view(3, 4, 3)
        norms = blocks.square().sum((0, 2), keepdim=True).sqrt()
        expected = blocks * (1 - 0.1 * 0.3 * 0.8 / norms).clamp(min=0) / (1 + 0.1 * 0.3 * 0.2)
        torch.testing.assert_close(after, expected.view(3, 12), rtol=1e-5, atol=1e-6)


def test_a_target_counts_the_concepts_of_an_embedding_head() -> None:
    model, log = make(EmbeddingBottleneck(3, randint=0.0)), Log()
    watch = train(SparsitySchedule(mode="cubic", target_nec=2, begin=0.0, end=0.5), model, logger=log)
    blocks = watch.alive[-1].view(3, 4, 3)
    assert int(blocks.any(2).sum()) == 6
    assert torch.equal(blocks.any(2), blocks.all(2))
    assert [row["train/sparsity/nec"] for row in log.rows if "train/sparsity/nec" in row][-1] == 2.0


@pytest.mark.parametrize(
    ("head", "pattern", "name"),
    [
        (lambda: MLPHead([5]), "head.*.weight", "head.layers.3.weight"),
        (lambda: ResidualHead(), "head.side.weight", "head.side.weight"),
        (lambda: None, "head.*", "head.linear.bias"),
    ],
)
@pytest.mark.parametrize("penalty", ["l1", "group"])
def test_weights_of_a_head_that_are_not_those_of_the_concepts(head: Any, pattern: str, name: str, penalty: Any) -> None:
    model = make(EmbeddingBottleneck(3, randint=0.0), head=head(), lr=0.05)
    group_dim = 0 if pattern == "head.*" else 1
    schedule = SparsitySchedule(pattern, "constant", 0.5, penalty=penalty, group_dim=group_dim, begin=0.0, end=0.0)
    watch = train(schedule, model, name)
    assert watch.counts[-1] < watch.weights[-1].numel()


# ---------------------------------------------------------------- several


def test_several_patterns_in_one_schedule() -> None:
    log = Log()
    model = make(LinearBottleneck("logits"), optimizer="SGD", lr=0.1)
    names = [HEAD, "bottleneck.scores.weight"]
    watch, schedule = Watch(names[1]), SparsitySchedule([HEAD, "bott*.weight"], mode="cubic", target_nec=2, end=0.6)
    head = train(schedule, model, callbacks=[watch], logger=log)
    assert (head.counts[-1], watch.counts[-1]) == (6, 8)
    keys = {key for row in log.rows for key in row if "sparsity" in key}
    assert keys == {f"train/sparsity/{name}/{key}" for name in names for key in ("nec", "density")}


def test_two_schedules_beside_each_other_log_their_own_numbers() -> None:
    log, model = Log(), make(LinearBottleneck("logits"), lr=0.05)
    head = SparsitySchedule(mode="cubic", target_nec=1, begin=0.0, end=0.3)
    other = SparsitySchedule("bottleneck.scores.weight", mode="cubic", target_nec=3, begin=0.0, end=0.3)
    assert head.state_key != other.state_key
    watch = Watch("bottleneck.scores.weight")
    assert train(head, model, callbacks=[other, watch], logger=log).counts[-1] == 3
    assert watch.counts[-1] == 12
    last = {key: value for row in log.rows for key, value in row.items() if key.endswith("/nec")}
    assert sorted(last.values()) == [1.0, 3.0]


def test_a_frozen_backbone_may_match() -> None:
    model = make(LinearBottleneck("logits"), ToyBackbone(frozen=True))
    before = model.backbone.layers[0].weight.detach().clone()
    schedule = SparsitySchedule(["backbone.layers.0.weight", HEAD], mode="cubic", target_nec=2, begin=0.0, end=0.5)
    assert train(schedule, model).counts[-1] == 6
    assert torch.equal(model.backbone.layers[0].weight, before)

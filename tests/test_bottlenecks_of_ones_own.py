"""What a bottleneck may ask of the module beyond predicting concepts, shown with bottlenecks as users write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import make
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule, LinearBottleneck, LinearHead, MLPHead
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.explanation import prediction_table
from cbm_lightning.heads import LabelHead, PassThroughHead
from cbm_lightning.types import ClassFacts, ConceptOutput, Intervention


class Draws(LinearBottleneck):
    """Draws in training steps, and remembers what it drew and whether it was told a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []
        self.silent = 0

    def forward(self, features, concepts=None):
        if self.generator is None:
            self.silent += 1
        else:
            self.drawn.append(float(torch.rand((), generator=self.generator)))
        return super().forward(features, concepts)


def drawn(steps: int, seed: int = 0, randint: float = 0.0, **options: Any) -> Draws:
    bottleneck = Draws()
    bottleneck.randint = randint
    quiet_trainer(max_steps=steps, **options).fit(make(bottleneck, seed=seed), ToyData())
    return bottleneck


def test_training_steps_have_draws_of_their_own() -> None:
    first = drawn(4)
    assert len(set(first.drawn)) == 4
    assert first.drawn == drawn(4).drawn
    assert first.drawn != drawn(4, seed=1).drawn
    # RandInt draws from another stream
    assert first.drawn == drawn(4, randint=0.5).drawn
    assert first.silent > 0  # the check before training
    assert first.generator is None


def test_a_phase_of_the_head_alone_is_a_training_step_too() -> None:
    bottleneck = Draws()
    quiet_trainer(max_epochs=2).fit(make(bottleneck, phases="sequential"), ToyData())
    assert len(bottleneck.drawn) == 12


def test_a_failed_step_leaves_no_generator_behind() -> None:
    class Fails(Draws):
        def losses(self, output, batch, context):
            raise RuntimeError("on purpose")

    bottleneck = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer(num_sanity_val_steps=0).fit(make(bottleneck), ToyData())
    assert bottleneck.drawn
    assert bottleneck.generator is None


class OwnsLabel(LinearBottleneck):
    owns_label = True

    def default_head(self) -> LabelHead:
        return PassThroughHead()

    def build(self, dims, concepts, num_classes):
        super().build(dims, concepts, num_classes)
        self.label = torch.nn.Linear(dims.pooled, num_classes)

    def forward(self, features, concepts=None):
        return super().forward(features, concepts).replace(label_logits=self.label(features.pooled))


def test_a_bottleneck_can_own_the_label() -> None:
    model = make(OwnsLabel())
    assert isinstance(model.head, PassThroughHead)
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(model, ToyData())
    assert 0 < trainer.test(model, ToyData(), verbose=False)[0]["test/label_acc"] <= 1


@pytest.mark.parametrize(
    ("bottleneck", "head", "message"),
    [
        (OwnsLabel, LinearHead, "OwnsLabel predicts the label itself, which does not go with LinearHead"),
        (LinearBottleneck, PassThroughHead, "LinearBottleneck leaves the label to the head.*use LinearHead"),
    ],
)
def test_exactly_one_part_predicts_the_label(bottleneck: Any, head: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(bottleneck(), head=head())


def test_a_head_of_the_bottlenecks_choice_survives_a_checkpoint(tmp_path) -> None:
    class Deep(LinearBottleneck):
        def default_head(self) -> LabelHead:
            return MLPHead([5])

    assert make(Deep()).hparams["head"]["class_path"].endswith("MLPHead")
    assert isinstance(make(Deep(), head=LinearHead()).head, LinearHead)


def test_a_loss_called_label_takes_the_place_of_the_modules() -> None:
    class Smoothed(LinearBottleneck):
        def losses(self, output, batch, context):
            own = 2.0 * context.label_loss(context.label_logits, batch["label"])
            return super().losses(output, batch, context) | ({"label": own} if self.generator is not None else {})

    doubled, plain = (quiet_trainer(max_steps=1, limit_val_batches=0) for _ in range(2))
    doubled.fit(make(Smoothed()), ToyData())
    plain.fit(make(LinearBottleneck()), ToyData())
    ratio = doubled.callback_metrics["train/loss_label"] / plain.callback_metrics["train/loss_label"]
    assert float(ratio) == pytest.approx(2.0)


def test_losses_of_training_steps_alone_can_be_weighed() -> None:
    class Extra(LinearBottleneck):
        def losses(self, output, batch, context):
            extra = {} if self.generator is None else {"extra": output.logits.square().mean()}
            return super().losses(output, batch, context) | extra

    trainer = quiet_trainer()
    trainer.fit(make(Extra(), loss_weights={"extra": 0.5}), ToyData())
    assert {"train/loss_extra", "val/loss"} <= trainer.callback_metrics.keys()
    assert "val/loss_extra" not in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"no loss is called \['extra'\]"):
        quiet_trainer().fit(make(LinearBottleneck(), loss_weights={"extra": 0.5}), ToyData())


def test_a_bottleneck_can_ask_for_the_training_annotations() -> None:
    class Prior(LinearBottleneck):
        needs_annotations = True
        seen: torch.Tensor | None = None

        def fit_annotations(self, concepts):
            self.seen = concepts

    bottleneck = Prior()
    quiet_trainer(max_steps=1).fit(make(bottleneck), ToyData())
    assert torch.equal(bottleneck.seen, ToyData().annotations("train")[0])


class Discovers(LinearBottleneck):
    """Finds directions that help the label, whatever is annotated."""

    discovers, needs_concepts, needs_label = True, False, True

    def losses(self, output, batch, context):
        assert "concepts" not in batch
        return {}


def discovering(k: int) -> CBMModule:
    torch.manual_seed(0)
    return CBMModule(ToyBackbone(), Discovers(), concepts=k, num_classes=CLASSES, lr=0.02)


def test_discovered_concepts_need_not_be_those_of_the_data() -> None:
    model, trainer = discovering(7), quiet_trainer(max_epochs=2)
    trainer.fit(model, ToyData())
    found = trainer.test(model, ToyData(), verbose=False)[0]
    assert "test/label_acc" in found
    assert [key for key in found if "concept" in key] == []
    assert "annotation" not in model.explain(toy_tensors(4))
    corrected = model.intervene(model(toy_tensors(4)), {model.concept_set.names[6]: 1.0})
    assert corrected.concepts.probs[:, 6].eq(1).all()


def test_how_many_concepts_to_discover_must_be_said() -> None:
    with pytest.raises(ValueError, match="Discovers discovers concepts of its own.*concepts=20"):
        CBMModule(ToyBackbone(), Discovers(), data=ToyData())


def test_nobody_can_say_what_is_true_of_discovered_concepts() -> None:
    trainer = quiet_trainer(callbacks=[InterventionEvaluation(["ucp"])])
    with pytest.raises(ValueError, match="concepts"):
        trainer.test(discovering(7), ToyData(), verbose=False)


class Doubts(LinearHead):
    def introduce(self, concepts, classes: ClassFacts) -> None:
        self.told = (concepts.names, classes.names)

    def uncertainty(self, output: ConceptOutput):
        return output.uncertainty.mean(1)


def test_predictions_say_how_uncertain_they_are() -> None:
    class Unsure(LinearBottleneck):
        def forward(self, features, concepts=None):
            output = super().forward(features, concepts)
            return output.replace(uncertainty=output.probs * (1 - output.probs))

    model = make(Unsure(), head=Doubts(), class_names=ToyData().class_names)
    assert model.head.told == (ToyData().concept_set.names, ToyData().class_names)
    data = ToyData()
    data.setup("test")
    rows = quiet_trainer().predict(model, data.test_dataloader())
    assert rows[0]["concept_uncertainty"].shape == (16, 4)
    table = prediction_table(model, rows)
    assert table["uncertainty"].to_numpy() == pytest.approx(
        table[[f"uncertainty: {name}" for name in model.concept_set.names]].mean(axis=1).to_numpy()
    )
    plain = quiet_trainer().predict(make(), data.test_dataloader())
    assert [key for key in plain[0] if "uncertainty" in key] == []


def test_a_phase_that_trains_nothing_is_refused() -> None:
    class Fixed(LinearBottleneck):
        def build(self, dims, concepts, num_classes):
            super().build(dims, concepts, num_classes)
            weight, bias = self.scores.weight.detach(), self.scores.bias.detach()
            del self.scores
            self.scores = lambda x: x @ weight.T + bias

    model = make(Fixed(), phases=[{"name": "nothing", "train": ["bottleneck"]}])
    with pytest.raises(ValueError, match=r"phase 'nothing': train: \['bottleneck'\] of this model have no parameters"):
        quiet_trainer().fit(model, ToyData())


def test_what_a_subclass_adds_is_something_to_train() -> None:
    class Wider(CBMModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.extra = torch.nn.Parameter(torch.zeros(()))

        def label_loss(self, logits, label):
            return super().label_loss(logits + self.extra * logits.detach().sin(), label)

    model = Wider(
        backbone=ToyBackbone(),
        bottleneck=Discovers(),
        head=FirstValues(),
        concepts=4,
        num_classes=CLASSES,
        phases=[{"name": "mine", "train": ["head"]}],
    )
    quiet_trainer(max_steps=3, limit_val_batches=0).fit(model, ToyData())
    assert model.extra != 0


class FirstValues(LabelHead):
    """Reads the first concepts as classes; has no parameters."""

    def classify(self, values, output):
        return values[..., :CLASSES]


def test_a_correction_of_a_pass_through_model_is_the_bottlenecks_own_business() -> None:
    model = make(OwnsLabel()).eval()
    with torch.no_grad():
        plain = model(toy_tensors(4)["image"])
        told = Intervention(torch.ones(4, 4, dtype=torch.bool), torch.ones(4, 4))
        assert torch.equal(model.intervene(plain, told).logits, plain.logits)

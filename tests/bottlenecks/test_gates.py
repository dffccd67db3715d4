"""Gates on the concepts of a linear bottleneck: what the head reads through them, and what closes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import engine_of, planned
from recorder import Log
from small_models import CONCEPTS, MIXED, small_model, small_samples
from torch import Tensor
from toy import WIDTH, ToyData, quiet_trainer
from toy_curves import accuracy_of_head, plain_accuracy, run, toy_model

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import intervention_evaluation as module
from cbm_lightning.interventions import Policy
from cbm_lightning.interventions.values import CollapseWarning
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention

LINKS = ["sigmoid", "logits", "relu", "hard"]
SHUT, HALF, OPEN = -9.0, 0.0, 9.0
MIX = [SHUT, HALF, OPEN, 1.0, SHUT, OPEN]  # of the six concepts of small models
READ = [0.0, 0.5, 1.0, 1.2 / (1 + math.exp(-1)) - 0.1, 0.0, 1.0]


def set_gates(bottleneck: LinearBottleneck, log_alpha: Any) -> None:
    with torch.no_grad():
        bottleneck.gates.log_alpha.copy_(torch.as_tensor(log_alpha))


def pair(link: Any, log_alpha: Any, extra: int = 0, concepts: Any = CONCEPTS) -> tuple[Any, Any]:
    """The same bottleneck with gates and without, in evaluation."""
    made = []
    for gates in (True, False):
        torch.manual_seed(0)
        bottleneck = LinearBottleneck(link, extra, gates=gates)
        bottleneck.build(FeatureDims(5), concepts, num_classes=2)
        made.append(bottleneck.eval())
    set_gates(made[0], log_alpha)
    return made[0], made[1]


def corrections(like: Tensor) -> list[Intervention]:
    """All concepts present, some of them absent, some taken out, some on the logit scale."""
    everything, alternate = torch.ones_like(like).bool(), torch.arange(like.numel()).view(like.shape) % 2 == 0
    ones, removed = torch.ones_like(like), torch.ones_like(like).masked_fill(alternate, torch.nan)
    return [
        Intervention(everything, ones),
        Intervention(alternate, 1 - ones),
        Intervention(everything, removed),
        Intervention(alternate, ones, 3 * ones),
    ]


def two_of_four(l0: float, lr: float = 0.1, epochs: int = 20, **options: Any) -> tuple[CBMModule, Any]:
    """A model trained on a label that the first two of four concepts tell."""

    class TwoOfFour(ToyData):
        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            return {**rows, "label": rows["concepts"][:, :2].sum(1).long()}

    torch.manual_seed(0)
    model = CBMModule(
        Identity(WIDTH),
        options.pop("bottleneck", None) or LinearBottleneck(gates=True),
        concepts=ToyData().concept_set,
        num_classes=3,
        lr=lr,
        loss_weights={"l0": l0, "label": options.pop("label", 1.0)},
    )
    trainer = quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, num_sanity_val_steps=0, **options)
    trainer.fit(model, TwoOfFour())
    return model, trainer


# ---------------------------------------------------------------- what the head reads


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("link", LINKS)
def test_the_head_reads_through_the_gates(link: str, extra: int) -> None:
    gated, plain = pair(link, MIX, extra)
    features = Features(torch.randn(9, 5))
    found, expected = gated(features), plain(features)
    factor = torch.tensor([*READ, *[1.0] * extra])
    torch.testing.assert_close(found.values, expected.values * factor)
    assert torch.equal(found.logits, expected.logits), "predictions of concepts know nothing of gates"
    assert torch.equal(found.probs, expected.probs)
    for correction in corrections(expected.probs):
        corrected, reference = gated.intervene(found, correction), plain.intervene(expected, correction)
        torch.testing.assert_close(corrected.values, reference.values * factor)
        assert torch.equal(corrected.probs, reference.probs)
        again = gated.intervene(corrected, correction)
        assert torch.equal(again.values, corrected.values), "a gate counts once"
        assert not corrected.values[:, [0, 4]].any(), "nothing passes a closed gate"


@pytest.mark.parametrize("link", LINKS)
def test_open_gates_change_nothing(link: str) -> None:
    gated, plain = pair(link, OPEN, 1)
    features = Features(torch.randn(9, 5))
    assert torch.equal(gated(features).values, plain(features).values)
    for correction in corrections(gated(features).probs):
        found = gated.intervene(gated(features), correction).values
        assert torch.equal(found, plain.intervene(plain(features), correction).values)


def test_gates_of_real_valued_concepts() -> None:
    gated, _ = pair("sigmoid", [OPEN, SHUT, OPEN, HALF, SHUT], concepts=MIXED)
    output = gated(Features(torch.randn(4, 5)))
    torch.testing.assert_close(output.values[:, 3], output.logits[:, 3] / 2)
    told = torch.tensor([1.0, 0.0, 0.0, -3.0, 1.0]).expand(4, -1)
    corrected = gated.intervene(output, Intervention(torch.ones(4, 5).bool(), told))
    assert corrected.values.tolist() == [[1.0, 0.0, 0.0, -1.5, 0.0]] * 4


def test_no_gates_leave_everything_as_it_was() -> None:
    gated, plain = pair("logits", HALF, 2)
    names = ["value_range", "scores.weight", "scores.bias", "extra.weight", "extra.bias"]
    assert list(plain.state_dict()) == names
    assert list(gated.state_dict()) == [*names, "gates.log_alpha", "gates.temperature"]
    output = plain(Features(torch.randn(3, 5)))
    assert output.extras == {}
    assert plain.diagnostics(output) == {}
    assert plain.spec()["init_args"]["gates"] is False
    # the weights of both were drawn from one seed
    assert all(torch.equal(gated.state_dict()[name], plain.state_dict()[name]) for name in names)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("link", LINKS)
def test_a_correction_in_training_meets_the_drawn_gates(link: str) -> None:
    gated, plain = pair(link, HALF, 1)
    gated.train()
    features = Features(torch.randn(200, 5))
    output = gated(features)
    drawn, expected = output.extras["gate"], plain(features)
    assert drawn.shape == (200, 6)
    assert len(drawn.unique()) > 500
    factor = torch.cat([drawn, torch.ones(200, 1)], 1)
    torch.testing.assert_close(output.values, expected.values * factor)
    before = torch.get_rng_state()
    for correction in corrections(expected.probs):
        reference = plain.intervene(expected, correction)
        torch.testing.assert_close(gated.intervene(output, correction).values, reference.values * factor)
    assert torch.equal(torch.get_rng_state(), before)


class Watched(LinearBottleneck):
    """Notes what it predicted in training, and from which annotations."""

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        output = super().forward(features, concepts)
        if self.training:
            self.noted = [*getattr(self, "noted", []), (output.detach(), concepts)]
        return output


def test_randint_lets_annotations_through_the_drawn_gates() -> None:
    read: list[Tensor] = []
    bottleneck = Watched(gates=True, randint=1.0)
    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda part, inputs: read.append(inputs[0].values.detach()) if part is model.head and part.training else None
    ):
        torch.manual_seed(0)
        model = CBMModule(Identity(WIDTH), bottleneck, concepts=ToyData().concept_set, num_classes=3)
        quiet_trainer(max_epochs=1, limit_val_batches=0).fit(model, ToyData())
    assert len(read) == len(bottleneck.noted) == 6
    for values, (output, concepts) in zip(read, bottleneck.noted, strict=True):
        assert torch.equal(values, concepts * output.extras["gate"])
    assert bottleneck.gates.log_alpha.grad is not None


@pytest.mark.parametrize("link", ["logits", "relu"])
def test_percentiles_are_those_of_ungated_scores(link: Any) -> None:
    bottleneck = Watched(link, gates=True)
    two_of_four(0.1, bottleneck=bottleneck, epochs=1)
    scores = torch.cat([output.logits for output, _ in bottleneck.noted])
    assert len(scores) == 96
    scores = scores.relu() if link == "relu" else scores
    torch.testing.assert_close(bottleneck.value_range, torch.quantile(scores, torch.tensor([0.05, 0.95]), dim=0))
    gated = torch.cat([output.values for output, _ in bottleneck.noted])
    assert (bottleneck.value_range[1] > torch.quantile(gated, 0.95, dim=0) + 0.01).any(), "gates would have shown"


# ---------------------------------------------------------------- the loss


def test_the_expected_share_of_open_gates_is_a_loss() -> None:
    log = Log()
    model, _ = two_of_four(0.3, epochs=2, logger=log)
    logged = {name: value for row in log.rows for name, value in row.items()}
    share = model.bottleneck.gates.open_probability().mean().item()
    assert logged["val/loss_l0"] == pytest.approx(share, rel=1e-5)
    assert 0.0 < logged["train/loss_l0"] < 1.0
    parts = {name: logged[f"val/loss_{name}"] for name in ("label", "concept", "l0")}
    assert logged["val/loss"] == pytest.approx(parts["label"] + parts["concept"] + 0.3 * parts["l0"], rel=1e-5)
    assert logged["val/open_gates"] == 4.0
    for log_alpha, extreme in ((-60.0, 0.0), (60.0, 1.0)):
        set_gates(model.bottleneck, log_alpha)
        assert model.bottleneck.gates.open_probability().mean().item() == pytest.approx(extreme, abs=1e-6)


def test_gates_close_where_the_label_does_not_need_the_concept() -> None:
    model, trainer = two_of_four(0.1)
    needed, others = model.bottleneck.gates.settled().split(2)
    assert bool((needed > 0.5).all())
    assert others.tolist() == [0.0, 0.0]
    found = trainer.callback_metrics
    assert found["val/open_gates"] == 2.0
    assert found["val/label_acc"] > 0.75, "chance is one half"
    assert trainer.test(model, ToyData(), verbose=False)[0]["test/open_gates"] == 2.0


def test_a_strong_weight_closes_all_gates() -> None:
    model, trainer = two_of_four(10.0, lr=0.2, epochs=6)
    assert model.bottleneck.gates.settled().tolist() == [0.0] * 4
    assert trainer.callback_metrics["val/open_gates"] == 0.0
    logits = model.eval()(torch.randn(5, WIDTH)).logits
    assert torch.equal(logits, model.head.linear.bias.expand(5, -1)), "only the bias is left"


def test_without_a_weight_nothing_pushes_the_gates() -> None:
    model, trainer = two_of_four(0.0, lr=0.2, epochs=6)
    assert bool((model.bottleneck.gates.settled()[:2] > 0.5).all()), "the label opens those it needs"
    assert not [name for name in trainer.callback_metrics if "l0" in name]


# ---------------------------------------------------------------- the rest of the package


def gated_model(link: Any = "logits", log_alpha: Any = MIX, extra: int = 0) -> CBMModule:
    model = small_model(LinearBottleneck(link, extra, gates=True))
    set_gates(model.bottleneck, log_alpha)
    return model


@pytest.mark.parametrize("extra", [0, 2])
def test_contributions_sum_to_the_logits(extra: int) -> None:
    model = gated_model(extra=extra)
    logits, output = model({"embedding": torch.randn(9, 7)})
    account = model.head.contributions(output)
    torch.testing.assert_close(account.concepts.sum(-1) + sum(account.other.values()), logits)
    assert not account.concepts[..., [0, 4]].any()
    assert bool((account.concepts[..., [1, 2, 3, 5]] != 0).all())


@pytest.mark.parametrize("name", ["rand", "ucp", "ectp", "coop", "greedy"])
@pytest.mark.parametrize("link", LINKS)
def test_curves_and_look_ahead_agree_with_predicting_anew(link: str, name: str) -> None:
    model = gated_model(link)
    engine, samples = engine_of(model), small_samples(model)
    steps = planned(engine, samples, Policy.make(name))
    with torch.inference_mode():
        found = engine.rollout(samples, steps, range(7)).logits
    bounds, truth = model.bottleneck.value_range, samples.answers.truth
    told = bounds[0] + (bounds[1] - bounds[0]) * truth
    own = model.bottleneck.read(samples.prediction.concepts.logits, samples.prediction.concepts.probs)
    for budget in range(7):
        values = torch.where(steps <= budget, told, own) * torch.tensor(READ)
        torch.testing.assert_close(found[budget], model.head.linear(values), rtol=1e-4, atol=1e-5)
    state = engine.start(samples)
    fast, anew = state._rank_one((0.0, 1.0)), state._predict_anew((0.0, 1.0))
    for k in range(6):
        for quick, exact in zip(fast(k, slice(None)), anew(k, slice(None)), strict=True):
            torch.testing.assert_close(quick, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
def test_the_callback_corrects_through_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "log_figure", lambda *_: None)
    model = toy_model(LinearBottleneck(gates=True))
    set_gates(model.bottleneck, [OPEN, HALF, SHUT, OPEN])
    with pytest.warns(CollapseWarning, match="'small'"):
        scores = run(model, policies=["ucp"]).scores("ucp")[0]
    rows = ToyData().tensors("test")
    assert scores[-1] == accuracy_of_head(model, rows["concepts"] * torch.tensor([1.0, 0.5, 0.0, 1.0]), rows["label"])
    assert scores[0] == plain_accuracy(model, rows) != scores[-1]


@pytest.mark.parametrize("phases", ["sequential", "independent"])
def test_gates_are_not_trained_without_the_label(phases: str) -> None:
    with pytest.raises(ValueError, match="phase 'concepts' trains the bottleneck without the label's gradient"):
        quiet_trainer(max_epochs=2).fit(toy_model(LinearBottleneck(gates=True), phases=phases), ToyData())


def test_a_checkpoint_brings_the_gates_along(tmp_path: Path) -> None:
    model, trainer = two_of_four(0.1, epochs=1)
    set_gates(model.bottleneck, [OPEN, HALF, SHUT, 1.0])
    trainer.save_checkpoint(tmp_path / "gated.ckpt")
    restored = CBMModule.load_from_checkpoint(tmp_path / "gated.ckpt").eval()
    x = torch.randn(5, WIDTH)
    assert torch.equal(restored(x).logits, model.eval()(x).logits)
    assert restored.bottleneck.gates.settled().tolist()[:3] == [1.0, 0.5, 0.0]
    assert not restored(x).concepts.values[:, 2].any()

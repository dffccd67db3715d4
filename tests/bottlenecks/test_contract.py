"""What every bottleneck owes: one suite over all of them, so that a new one is a new line in `contract.CASES`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from bottlenecks.contract import CASES, batch, correction, make, samples
from torch import Tensor
from toy import quiet_trainer
from toy_images import ToyImages

from cbm_lightning import CBMModule, bottlenecks
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.interventions import InterventionEngine, Units
from cbm_lightning.interventions.policies import UCP
from cbm_lightning.phases import PARTS, Phase
from cbm_lightning.randomness import step_generator
from cbm_lightning.saliency import concept_maps
from cbm_lightning.types import Intervention

every = pytest.mark.parametrize("name", CASES)


def step(model: CBMModule, content: dict[str, Any]) -> dict[str, Tensor]:
    """The losses of a training step, as the module computes them, and their gradients."""
    model.zero_grad()
    with model.bottleneck.drawing(step_generator(0)):
        given = model.read_batch({**content, "concepts": content["concepts"].float()})
        output = model.bottleneck(model.encode(given), given.get("concepts"))
        total, parts = model.losses(model.head(output), output, given)
    total.backward()
    return {"total": total.detach(), **parts}


def gradients(model: CBMModule) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_suite_knows_every_bottleneck() -> None:
    exported = {getattr(bottlenecks, name) for name in bottlenecks.__all__}
    shown = {type(case.make()) for case in CASES.values()}
    assert {cls for cls in exported if issubclass(cls, Bottleneck) and cls is not Bottleneck} == shown


# ---------------------------------------------------------------- predictions


@every
@pytest.mark.parametrize("training", [False, True])
def test_shapes_and_types(name: str, training: bool) -> None:
    model, content = make(name).train(training), batch()
    with model.bottleneck.drawing(step_generator(0)) if training else torch.no_grad():
        features = model.encode(content)
        given = content["concepts"].float() if training and not model.bottleneck.discovers else None
        output = model.bottleneck(features, given)
        logits = model.head(output)
    n, k = 6, len(model.concept_set)
    assert logits.shape == (n, 3)
    assert output.logits.shape == output.probs.shape == (n, k)
    assert bool(((output.probs >= 0) & (output.probs <= 1)).all())
    assert output.values.shape[-2:] == (n, model.bottleneck.layout.size)
    assert output.values.ndim == 2 + output.sample_dim + output.time_dim
    assert output.maps is None or output.maps.shape[:2] == (n, k)
    assert output.uncertainty is None or output.uncertainty.shape == (n, k)
    assert (output.label_logits is not None) == model.bottleneck.owns_label
    assert output.features is features
    floats = [x for x in [logits, *output.tensors()] if x.is_floating_point()]
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in floats)


@every
def test_a_sample_is_predicted_the_same_in_any_batch_and_again(name: str) -> None:
    model, content = make(name).eval(), batch()
    with torch.inference_mode():
        together, again = model(content), model(content)
        one = model({"image": content["image"][3:4]})
    assert torch.equal(together.logits, again.logits)
    torch.testing.assert_close(one.logits, together.logits[3:4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.concepts.probs, together.concepts.probs[3:4], atol=1e-4, rtol=1e-4)


@every
def test_contributions_add_up_to_the_logits(name: str) -> None:
    model = make(name).eval()
    logits, output = model(batch())
    account = model.head.contributions(output)
    if account is None:
        assert output.sample_dim or output.label_logits is not None or model.head.concept_weight() is None
        return
    assert account.concepts.shape == (6, 3, len(model.concept_set))
    torch.testing.assert_close(account.concepts.sum(-1) + sum(account.other.values()), logits)


# ---------------------------------------------------------------- corrections


@every
def test_correcting_nothing_changes_nothing(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        plain = model(batch())
        same = model.intervene(plain, correction(model, plain, "no"))
    torch.testing.assert_close(same.logits, plain.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same.concepts.probs, plain.concepts.probs, atol=1e-5, rtol=1e-5)


@every
def test_a_corrected_concept_is_what_it_was_corrected_to(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        plain = model(batch())
        told = correction(model, plain, "some")
        corrected = model.intervene(plain, told)
    assert corrected.logits.shape == plain.logits.shape
    if CASES[name].exact:
        found, wanted = corrected.concepts.probs[told.mask], told.values[told.mask]
        torch.testing.assert_close(found, wanted, atol=1e-2, rtol=0)
    assert not torch.equal(corrected.logits, plain.logits)


@every
def test_once_everything_is_corrected_the_image_says_no_more(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        first, other = (model(batch(seed=seed)) for seed in (0, 1))
        told = correction(model, first, "all")
        logits = [model.intervene(prediction, told).logits for prediction in (first, other)]
    # the two differ in their images only
    assert not torch.allclose(first.logits, other.logits, atol=1e-4)
    assert torch.allclose(*logits, atol=1e-4) == CASES[name].closed


@every
def test_correcting_runs_no_backbone_and_writes_nothing(name: str) -> None:
    model = make(name).eval()
    with torch.inference_mode():
        plain = model(batch())
        calls = model.backbone.calls
        before = [x.clone() for x in (*plain.concepts.tensors(), plain.logits)]
        first = model.intervene(plain, correction(model, plain, "some"))
        again = model.intervene(plain, correction(model, plain, "some"))
    assert model.backbone.calls == calls
    assert all(torch.equal(a, b) for a, b in zip(before, (*plain.concepts.tensors(), plain.logits), strict=True))
    assert torch.equal(first.logits, again.logits)


@every
def test_what_is_told_of_a_sample_reaches_no_other(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        plain = model(batch())
        told = correction(model, plain, "all")
        only = Intervention(told.mask & (torch.arange(6) == 2)[:, None], told.values)
        one, every_one = model.intervene(plain, only).logits, model.intervene(plain, told).logits
    rest = torch.arange(6) != 2
    torch.testing.assert_close(one[rest], plain.logits[rest], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one[2], every_one[2], atol=1e-4, rtol=1e-4)


@every
def test_a_concept_that_is_taken_out_leaves_finite_numbers(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        plain = model(batch())
        without = model.intervene(plain, {model.concept_set.names[0]: float("nan")})
    assert without.logits.isfinite().all()
    assert without.concepts.probs.isfinite().all()


@every
def test_the_engine_corrects_it(name: str) -> None:
    model, content = make(name).eval(), batch()
    with torch.inference_mode():
        waiting = samples(model(content), content)
        engine = InterventionEngine(model, Units.make(model.concept_set))
        policy = UCP()
        policy.build(engine.units)
        (steps,) = engine.plan([waiting], policy)
        count = len(model.concept_set)
        found = engine.rollout(waiting, steps, [0, 1, count])
    torch.testing.assert_close(found.logits[0], waiting.prediction.logits, atol=1e-5, rtol=1e-5)
    assert found.corrected.tolist() == [[0] * 6, [1] * 6, [count] * 6]
    assert found.logits.isfinite().all()


@every
def test_it_has_concept_maps(name: str) -> None:
    model = make(name).eval()
    maps = concept_maps(model, batch()["image"], "auto")
    assert maps.shape == (6, len(model.concept_set), 16, 16)
    assert maps.isfinite().all()
    assert maps.any()


# ---------------------------------------------------------------- training


@every
def test_batches_are_not_written_to(name: str) -> None:
    model, content = make(name), batch()
    before = {key: value.clone() for key, value in content.items()}
    step(model, content)
    assert all(torch.equal(before[key], content[key]) for key in before)
    assert content["concepts"].dtype == torch.int64


@every
def test_a_joint_step_reaches_every_parameter(name: str) -> None:
    model = make(name)
    losses = step(model, batch())
    assert {f"loss_{part}" for part in ("label", *CASES[name].losses)} | {"total"} == losses.keys()
    found = gradients(model)
    assert found.keys() == {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert all(gradient.isfinite().all() for gradient in found.values())


@every
def test_the_same_step_draws_the_same_numbers(name: str) -> None:
    model = make(name)
    model.bottleneck.on_progress(0.5)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    first = step(model, batch())
    model.load_state_dict(state)
    torch.manual_seed(1)
    second = step(model, batch())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every
@pytest.mark.parametrize("unknown", ["half", "all", "soft"])
def test_unknown_and_soft_annotations_are_fine(name: str, unknown: str) -> None:
    model, content = make(name), batch()
    concepts = content["concepts"].float()
    if unknown == "soft":
        concepts = concepts * 0.6 + 0.2
    else:
        concepts[:, 1 if unknown == "half" else slice(None)] = torch.nan
    losses = step(model, {**content, "concepts": concepts})
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@every
@pytest.mark.parametrize("part", PARTS)
def test_a_phase_moves_what_it_trains_and_nothing_else(name: str, part: str) -> None:
    model = make(name, phases=[Phase("only", train=[part])], lr=0.01)
    parameters = {key for key, _ in model.named_parameters() if key.startswith(f"{part}.")}
    if not parameters:
        with pytest.raises(ValueError, match="have no parameters; train something else"):
            quiet_trainer().fit(model, ToyImages())
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quiet_trainer(max_steps=3, limit_val_batches=0).fit(model, ToyImages())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert parameters <= moved
    strangers = {key for key in moved if not key.startswith(f"{part}.")}
    assert strangers == set()


@every
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_labels(name: str, task: str) -> None:
    content = batch()
    model = make(name, task=task, num_classes=2 if task == "binary" else 3)
    label = content["label"] > 0 if task == "binary" else content["concepts"] > 0
    losses = step(model, {**content, "label": label.long()})
    assert losses["total"].isfinite()
    with torch.no_grad():
        plain = model.eval()(content)
        assert plain.logits.shape == (6, 1 if task == "binary" else 3)
        assert model.intervene(plain, correction(model, plain, "some")).logits.isfinite().all()


# ---------------------------------------------------------------- life in a Trainer


@every
def test_a_checkpoint_restores_it(name: str, tmp_path) -> None:
    model = make(name, lr=0.01)
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, ToyImages())
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)
    restored = CBMModule.load_from_checkpoint(
        str(tmp_path / "model.ckpt"), backbone=type(model.backbone)(dropout=0.0)
    ).eval()
    with torch.no_grad():
        assert torch.equal(restored(batch()).logits, model.eval()(batch()).logits)
    results = trainer.test(model, ToyImages(), verbose=False)[0]
    assert 0 <= results["test/label_acc"] <= 1
    assert ("test/concept_acc" in results) != model.bottleneck.discovers
    data = ToyImages()
    data.setup("test")
    rows = trainer.predict(model, data.test_dataloader())
    assert rows[0]["concept_probs"].shape[1] == len(model.concept_set)


@every
def test_half_precision(name: str) -> None:
    model, content = make(name, lr=0.01), batch()
    with torch.no_grad():
        full = model.eval()(content).concepts.probs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(content)
            assert model.intervene(half, correction(model, half, "some")).logits.isfinite().all()
    torch.testing.assert_close(half.concepts.probs.float(), full, atol=0.06, rtol=0)
    trainer = quiet_trainer(precision="bf16-mixed")
    trainer.fit(model.train(), ToyImages())
    assert trainer.callback_metrics["val/loss"].isfinite()


@every
def test_copies_and_compiled_copies_predict_alike(name: str) -> None:
    model, content = make(name).eval(), batch()
    with torch.no_grad():
        expected = model(content).logits
        assert torch.equal(copy.deepcopy(model)(content).logits, expected)
        torch._dynamo.reset()
        # what is compiled is traced here; generating code for it takes minutes and is torch's business
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(content).logits, expected, atol=1e-5, rtol=1e-5)


class Logits(torch.nn.Module):
    """Images to class logits and concepts, as deployment wants it."""

    def __init__(self, model: CBMModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits, output = self.model(image)
        return logits, output.probs


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exports])
def test_the_prediction_path_is_exported(name: str) -> None:
    model, image = make(name).eval(), batch()["image"]
    with torch.no_grad():
        program = torch.export.export(Logits(model), (image,), strict=False)
        kept = io.BytesIO()
        torch.export.save(program, kept)
        kept.seek(0)
        logits, probs = torch.export.load(kept).module()(image)
        torch.testing.assert_close(logits, model(image).logits)
        torch.testing.assert_close(probs, model(image).concepts.probs)

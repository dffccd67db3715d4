"""The images that activate each concept most: which ones, with which maps, and where the picture goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from toy import ToyBackbone, ToyData, quiet_trainer
from toy_images import NAMES, ForeignImages, ToyConv, ToyImages, batch_of, looker, toy_model

from cbm_lightning import CBMModule, EmbeddingBottleneck
from cbm_lightning.bottlenecks import Bottleneck, SlotBottleneck
from cbm_lightning.callbacks import ConceptExemplars
from cbm_lightning.callbacks import concept_exemplars as module
from cbm_lightning.callbacks.concept_exemplars import THUMBNAIL, ranking, thumbnails, top
from cbm_lightning.callbacks.exemplars_figure import DARK, Exemplars, draw_exemplars, lit
from cbm_lightning.callbacks.loggers import rasterize, to_bytes
from cbm_lightning.callbacks.passes import Positions
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.saliency import concept_maps
from cbm_lightning.types import Batch, ConceptOutput, Features, Prediction


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(
    made: LightningModule, data: Any = None, trainer: dict[str, Any] | None = None, draw: bool = False, **options: Any
) -> list[Exemplars]:
    """What the picture of a test shows; it is drawn only on demand."""
    watcher = ConceptExemplars(**options)
    tester = quiet_trainer(callbacks=[watcher], **(trainer or {}))
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(module, "draw_exemplars", lambda rows: None)
            patch.setattr(module, "log_figure", lambda trainer, name, figure: None)
        tester.test(made, ToyImages() if data is None else data, verbose=False)
    return watcher.result


def same_weights(kind: type[CBMModule]) -> CBMModule:
    """A `looker` of another class."""
    parts = looker()
    made = kind(parts.backbone, parts.bottleneck, concepts=NAMES, num_classes=3)
    with torch.no_grad():
        for found, expected in zip(made.parameters(), looker().parameters(), strict=True):
            found.copy_(expected)
    return made


def predicted(made: CBMModule, n: int = 9, split: int = 2) -> ConceptOutput:
    with torch.no_grad():
        return made.eval()(made.read_batch(batch_of(n, seed=split))).concepts


def slots() -> CBMModule:
    return CBMModule(ToyConv(), SlotBottleneck(width=8, initial_sum=1.0), concepts=4, num_classes=3)


# ---------------------------------------------------------------- which images


@pytest.mark.parametrize(
    ("make", "batch_size"),
    [
        (looker, 2),
        (looker, 4),
        (looker, 16),
        (slots, 2),
        (toy_model, 2),
        (lambda: toy_model(EmbeddingBottleneck(4)), 2),
    ],
)
def test_it_shows_the_images_that_a_sort_of_everything_finds(make: Any, batch_size: int) -> None:
    made = make()
    output, images = predicted(made), to_bytes(batch_of(9, seed=2)["image"])
    result = run(made, ToyImages(batch_size=batch_size), images=4)
    assert [row.name for row in result] == list(made.concept_set.names)
    for k, row in enumerate(result):
        order = output.logits[:, k].sort(descending=True).indices[:4]
        assert torch.equal(row.images, images[order])
        torch.testing.assert_close(row.values, output.probs[order, k])


def test_maps_are_those_of_the_model_where_it_has_exact_ones() -> None:
    made = slots()
    output = predicted(made)
    for k, row in enumerate(run(made, images=3)):
        order = output.logits[:, k].sort(descending=True).indices[:3]
        torch.testing.assert_close(row.maps, output.maps[order, k])
    linear = looker()
    exact = concept_maps(linear, batch_of(9, seed=2)["image"], "exact").detach()
    order = predicted(linear).logits[:, 1].sort(descending=True).indices[:3]
    shown = run(linear, images=3)[1].maps
    enlarged = torch.nn.functional.interpolate(shown[:, None], exact.shape[-2:], mode="bilinear")[:, 0]
    torch.testing.assert_close(enlarged, exact[order, 1], rtol=1e-3, atol=1e-3)
    assert run(toy_model(EmbeddingBottleneck(4)))[0].maps is None


def test_a_bottleneck_whose_maps_do_not_suit_the_features_has_none() -> None:
    class MaxPooled(ToyConv):
        def encode(self, x: Tensor) -> Features:
            found = super().encode(x)
            return Features(found.tokens.amax(1), found.tokens, grid=found.grid)

    assert run(toy_model(backbone=MaxPooled))[0].maps is None


def test_only_some_concepts_and_fewer_images_than_wanted() -> None:
    made = looker()
    result = run(made, concepts=["blue", "red"], images=20)
    assert [(row.name, len(row.images)) for row in result] == [("blue", 9), ("red", 9)]
    assert [row.name for row in run(made, concepts=2)] == NAMES[:2]


def test_only_the_first_loader_counts() -> None:
    class Several(CBMModule):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(self.read_batch(batch))

    found, expected = run(same_weights(Several), ForeignImages("several"), images=3), run(looker(), images=3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


def test_members_of_a_group_are_ranked_within_it_and_others_by_their_logit() -> None:
    concepts = ConceptSet(["a", "b", "c"], {"ab": ["a", "b"]}, ["categorical", "categorical", "binary"])
    logits = torch.tensor([[9.0, 9.0, 40.0], [1.0, -5.0, 50.0]])
    output = ConceptOutput(Features(logits), logits, logits.sigmoid(), logits)
    found = ranking(output, concepts)
    torch.testing.assert_close(found[:, :2], logits[:, :2].log_softmax(1))
    assert found[1, 0] > found[0, 0]
    # both probabilities are one
    assert found[1, 2] > found[0, 2]


def test_equal_scores_go_by_position_and_bad_ones_are_not_shown() -> None:
    kept = {"score": torch.tensor([[3.0, 1.0]]), "position": torch.tensor([[7, 2]])}
    new = {"score": torch.tensor([[1.0, 3.0, -torch.inf]]), "position": torch.tensor([[1, 4, 0]])}
    assert top(kept, new, 4)["position"].tolist() == [[4, 7, 1, 2]]
    assert top(new, kept, 4)["position"].tolist() == [[4, 7, 1, 2]]
    assert top({}, {}, 3) == {}

    class Diverged(CBMModule):
        def forward(self, x: Any) -> Prediction:
            logits, output = super().forward(x)
            bad = output.logits.clone()
            bad[0] = torch.nan
            return Prediction(logits, output.replace(logits=bad))

    found = run(same_weights(Diverged), ToyImages(batch_size=3), images=9)
    assert [len(row.images) for row in found] == [6, 6, 6]


def test_a_module_of_ones_own_and_tuples() -> None:
    class Own(LightningModule):
        concept_set = ConceptSet(["bright"])

        def read_batch(self, batch: Any) -> Batch:
            return {"image": batch[0]}

        def forward(self, batch: Batch) -> Prediction:
            score = batch["image"].mean((1, 2, 3))[:, None]
            return Prediction(score, ConceptOutput(Features(score), score, score.sigmoid(), score))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def test_dataloader(self) -> Any:
            grey = torch.linspace(0, 1, 5)[[3, 0, 4, 1, 2], None, None, None].expand(-1, 1, 6, 8)
            return DataLoader(torch.utils.data.TensorDataset(grey), batch_size=2)

    watcher = ConceptExemplars(images=2)
    quiet_trainer(callbacks=[watcher]).test(Own(), verbose=False)
    [row] = watcher.result
    assert row.images.shape == (2, 3, 6, 8)
    assert row.images.flatten(1).float().mean(1).tolist() == [255, 191]


def test_two_processes_show_what_one_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = looker()
    expected = run(made, images=4)
    parts: list[dict[str, Tensor]] = []
    for rank in (0, 1):
        monkeypatch.setattr(module, "gather_columns", lambda columns: parts.append(columns) or columns)

        class Shared(ToyImages):
            def tensors(self, name: str, rank: int = rank) -> Any:
                return {key: value[rank::2] for key, value in super().tensors(name).items()}

        monkeypatch.setattr(module, "Positions", lambda loader, world, number, rank=rank: Positions(loader, 2, rank))
        run(made, Shared(), images=4)
    both = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    monkeypatch.setattr(module, "gather_columns", lambda columns: both)
    found = run(made, images=4)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.maps, b.maps)


def test_memory_does_not_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    merge = top

    def watched(*args: Any) -> Any:
        found = merge(*args)
        kept.append(found["image"].shape[1])
        return found

    monkeypatch.setattr(module, "top", watched)
    run(looker(), ToyImages(n_eval=40), images=3)
    assert set(kept) == {3}
    assert thumbnails(torch.rand(2, 3, 300, 600)).shape == (2, 3, THUMBNAIL // 2, THUMBNAIL)
    assert thumbnails(torch.full((1, 3, 300, 200), 200, dtype=torch.uint8)).unique().tolist() == [200]
    assert thumbnails(torch.rand(2, 3, 30, 20)).shape == (2, 3, 30, 20)


# ---------------------------------------------------------------- when and where


def test_a_picture_an_evaluation_of_the_wanted_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "draw_exemplars", lambda rows: None)
    monkeypatch.setattr(module, "log_figure", lambda trainer, name, figure: seen.append((name, trainer.current_epoch)))
    watchers = [ConceptExemplars(stages=["val"], every_n_epochs=2), ConceptExemplars(name="others")]
    trainer = quiet_trainer(max_epochs=4, callbacks=watchers, num_sanity_val_steps=1)
    made = toy_model()
    trainer.fit(made, ToyImages())
    assert seen == [("val/exemplars/figure", 1), ("val/exemplars/figure", 3)]
    trainer.test(made, ToyImages(), verbose=False)
    assert seen[2:] == [("test/others/figure", 4)]


def test_the_picture_is_written_and_nothing_else_changes() -> None:
    made = toy_model()
    made.train()
    modes = [part.training for part in made.modules()]
    before = torch.get_rng_state()
    run(made, draw=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in made.modules()] == modes
    [path] = Path("media/test/exemplars").iterdir()
    assert path.suffix == ".png"
    assert path.stat().st_size > 1000


def test_half_precision(tmp_path: Path) -> None:
    result = run(slots(), trainer={"precision": "bf16-mixed"}, images=2)
    assert {row.values.dtype for row in result} == {torch.float32}
    assert all(row.maps.shape == (2, 8, 8) for row in result)


# ---------------------------------------------------------------- the picture


def test_an_image_is_bright_where_the_concept_is() -> None:
    image, found = torch.full((3, 8, 8), 200, dtype=torch.uint8), torch.zeros(2, 2)
    found[0, 1], found[1, 0] = 4.0, -9.0
    shown = lit(image, found)
    assert shown[:, 0, 7].tolist() == [200] * 3
    assert shown[:, 7, 0].tolist() == [round(200 * DARK)] * 3
    nothing = lit(image, torch.full((2, 2), torch.nan))
    assert nothing.unique().tolist() == [round(200 * DARK)]


def test_a_row_a_concept_with_its_numbers() -> None:
    rows = [
        Exemplars(
            "red $x", torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.tensor([0.93, 0.5]), torch.rand(2, 4, 4)
        ),
        Exemplars("nobody", torch.zeros(0, 3, 8, 12, dtype=torch.uint8), torch.zeros(0), torch.zeros(0, 4, 4)),
        Exemplars("blue", torch.zeros(1, 3, 8, 12, dtype=torch.uint8), torch.tensor([0.1])),
    ]
    for columns, lines in ((1, 3), (2, 2), (9, 1)):
        figure = draw_exemplars(rows, columns)
        assert rasterize(figure).float().std() > 0
        assert [text.get_text() for text in figure.texts] == ["red $x", "nobody", "blue"]
        assert [axes.get_xlabel() for axes in figure.axes] == ["0.93", "0.50", "0.10"]
        boxes = [axes.get_position() for axes in figure.axes]
        assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
        assert len({round(text.get_position()[1], 5) for text in figure.texts}) == lines


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"concepts": 0}, "concepts: expected at least 1, got 0"),
        ({"concepts": []}, "concepts: expected at least 1, got 0"),
        ({"concepts": "red"}, "concepts: expected a list of names or a number, got 'red'"),
        ({"stages": ["train"]}, "stages: expected 'val', 'test' or both"),
        ({"every_n_epochs": 0}, "every_n_epochs: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptExemplars(**options)


def test_what_does_not_go_with_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="green"):
        run(looker(), concepts=["gren"])
    with pytest.raises(ValueError, match="two evaluations of one Trainer would log under 'exemplars'"):
        quiet_trainer(callbacks=[ConceptExemplars(), ConceptExemplars(images=2)]).test(looker(), ToyImages())
    numbers = CBMModule(ToyBackbone(), concepts=ToyData().concept_set, num_classes=3)
    with pytest.raises(ValueError, match=r"shows images \[B, 1 or 3, H, W\], and the batch has none"):
        run(numbers, ToyData())

    class Bare(LightningModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(TypeError, match=r"Bare has no \['concept_set', 'read_batch'\]: use CBMModule"):
        run(Bare(), ToyImages())


def test_it_names_no_method() -> None:
    source = Path(module.__file__).read_text()
    names = [cls.__name__ for cls in Bottleneck.__subclasses__()]
    assert not [name for name in [*names, "SlotBottleneck"] if name in source]

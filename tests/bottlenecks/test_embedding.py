from __future__ import annotations

import pytest
import torch

from cbm_lightning.bottlenecks import EmbeddingBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import FeatureDims, Features, Intervention

CONCEPTS = ConceptSet(["a", "b", "c"])


@pytest.fixture(params=[True, False], ids=["shared scorer", "own scorers"])
def bottleneck(request: pytest.FixtureRequest) -> EmbeddingBottleneck:
    made = EmbeddingBottleneck(embedding_size=4, shared_scorer=request.param)
    made.build(FeatureDims(5), CONCEPTS, num_classes=2)
    return made


def test_matches_the_equations_written_out(bottleneck: EmbeddingBottleneck) -> None:
    x = torch.randn(6, 5)
    output = bottleneck(Features(x))
    pairs = torch.nn.functional.leaky_relu(bottleneck.embed[0](x)).view(6, 3, 8)
    for k in range(3):
        row = 0 if bottleneck.shared_scorer else k
        p = torch.sigmoid(pairs[:, k] @ bottleneck.score_weight[row] + bottleneck.score_bias[row])
        torch.testing.assert_close(output.probs[:, k], p)
        mixed = p[:, None] * pairs[:, k, :4] + (1 - p[:, None]) * pairs[:, k, 4:]
        torch.testing.assert_close(output.values[:, 4 * k : 4 * k + 4], mixed)


def test_a_correction_mixes_again_and_nan_removes(bottleneck: EmbeddingBottleneck) -> None:
    output = bottleneck(Features(torch.randn(2, 5)))
    pairs = output.extras["pairs"]
    mask = torch.tensor([[True, True, False]] * 2)
    fixed = bottleneck.intervene(output, Intervention(mask, torch.tensor([[1.0, 0.0, 1.0]] * 2)))
    torch.testing.assert_close(fixed.values[:, :4], pairs[:, 0, 0])
    torch.testing.assert_close(fixed.values[:, 4:8], pairs[:, 1, 1])
    torch.testing.assert_close(fixed.values[:, 8:], output.values[:, 8:])
    removed = bottleneck.intervene(output, Intervention(mask, torch.full((2, 3), float("nan"))))
    assert removed.values[:, :8].abs().sum() == 0
    torch.testing.assert_close(removed.probs, output.probs)


def test_randint_is_on_by_default_as_in_the_paper() -> None:
    assert EmbeddingBottleneck().randint == 0.25


def test_real_concepts_are_refused() -> None:
    with pytest.raises(ValueError, match="real-valued"):
        EmbeddingBottleneck().build(FeatureDims(5), ConceptSet(["size"], kinds="real"), 2)


def test_a_second_correction_keeps_the_first() -> None:
    bottleneck = EmbeddingBottleneck(4)
    bottleneck.build(FeatureDims(5), ConceptSet(["a", "b", "c"]), 2)
    mask = torch.tensor([[True, False, False]] * 2)
    removed = bottleneck.intervene(
        bottleneck(Features(torch.randn(2, 5))), Intervention(mask, torch.full((2, 3), torch.nan))
    )
    both = bottleneck.intervene(removed, Intervention(mask.roll(1, 1), torch.ones(2, 3)))
    assert both.values[:, :4].abs().sum() == 0

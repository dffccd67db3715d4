"""Drawing hard concepts from scores: the noise that decides, drawn in training and fixed in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.randomness import Randomness

# uniforms end this far from 0 and 1, where the noise is infinite
EDGE = 1e-6
# the score of what is known for certain, far above any noise
CERTAIN = 1e4


class ConceptNoise(nn.Module):
    """Noise of ``S`` draws a sample: a concept is drawn present where score plus noise is positive.

    The noise is logistic, so that a concept of score ``z`` is drawn with probability ``sigmoid(z)``. For members of a
    categorical group it is a Gumbel variable, and the member whose score plus noise is largest is drawn, with the
    probability that the softmax of the scores gives it. In evaluation all samples share the same fixed noise, so that
    what is drawn for one does not depend on the others.

    Args:
        concepts: The concept set.
        samples: ``S``.
        name: What draws; other names have other noise.

    Example:
        >>> noise = ConceptNoise(ConceptSet(["red", "round"]), samples=1000, name="example")
        >>> noise.fixed.shape
        torch.Size([1000, 2])
        >>> drawn = torch.tensor([0.0, 2.0]) + noise.fixed > 0
        >>> [round(share, 1) for share in drawn.float().mean(0).tolist()]
        [0.5, 0.9]
    """

    fixed: Tensor
    categorical: Tensor

    def __init__(self, concepts: ConceptSet, samples: int, name: str) -> None:
        super().__init__()
        categorical = torch.tensor([kind == "categorical" for kind in concepts.kinds])
        self.register_buffer("categorical", categorical, persistent=False)
        uniform = Randomness(0, name, torch.arange(samples)).uniform("concepts", len(concepts))
        self.register_buffer("fixed", self.of(uniform), persistent=False)

    def of(self, uniform: Tensor) -> Tensor:
        """``[..., K]`` uniforms in [0, 1) to noise."""
        uniform = uniform.clamp(EDGE, 1.0 - EDGE)
        return torch.where(self.categorical, -(-uniform.log()).log(), uniform.logit())

    def draw(self, rows: int, samples: int, generator: torch.Generator | None) -> Tensor:
        """``[B, S, K]`` fresh noise, drawn on the CPU; from the global generator if none is given."""
        # single precision whatever the default: in half precision a uniform rounds to 1, where the noise is infinite
        uniform = torch.rand(rows, samples, len(self.categorical), generator=generator, dtype=torch.float32)
        return self.of(uniform.to(self.categorical.device))

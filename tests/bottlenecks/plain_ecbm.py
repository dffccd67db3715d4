"""The energies of an ECBM as the paper defines them: concept by concept and class by class, nothing precomputed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import EnergyBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.module import CBMModule
from cbm_lightning.types import Intervention

WIDTH, CLASSES, SIZE = 5, 4, 6
CONCEPTS = ConceptSet(["red", "round", "wet"])
GROUPED = ConceptSet(
    ["red", "blue", "green", "wet"],
    groups={"colour": ["red", "blue", "green"]},
    kinds=["categorical", "categorical", "categorical", "binary"],
)


def model_of(concepts: ConceptSet = CONCEPTS, task: str = "multiclass", seed: int = 0, **options) -> CBMModule:
    """A model in evaluation mode whose energies differ enough to matter."""
    torch.manual_seed(seed)
    bottleneck = EnergyBottleneck(SIZE, **options)
    model = CBMModule(Identity(WIDTH), bottleneck, concepts=concepts, num_classes=CLASSES, task=task).eval()
    with torch.no_grad():
        for weight in (bottleneck.class_weight, bottleneck.concept_weight, bottleneck.joint_weight):
            weight.copy_(2.0 * torch.randn_like(weight))
        bottleneck.to_joint.weight.mul_(4.0)
    return model


def mixed(pair: Tensor, p: Tensor) -> Tensor:
    """``[B, H]`` of an absent and a present embedding ``[2, H]`` by ``p [B]``."""
    return (1 - p)[:, None] * pair[0] + p[:, None] * pair[1]


def class_energy(bottleneck: EnergyBottleneck, x: Tensor, classes: Tensor) -> Tensor:
    """``[B]`` ``E_xy`` of mixed classes ``[B, L]``."""
    z = bottleneck.to_class(x)
    u = normalize(classes @ bottleneck.class_embeddings, dim=-1)
    return torch.relu(z + z * u) @ bottleneck.class_weight


def concept_energy(bottleneck: EnergyBottleneck, x: Tensor, k: int, p: Tensor) -> Tensor:
    """``[B]`` ``E_xc`` of concept ``k`` mixed by ``p [B]``."""
    z = bottleneck.to_concepts(x)
    v = normalize(mixed(bottleneck.concept_embeddings[k], p), dim=-1)
    return torch.relu(z + z * v) @ bottleneck.concept_weight[k]


def joint_energy(bottleneck: EnergyBottleneck, p: Tensor, classes: Tensor, removed: Tensor | None = None) -> Tensor:
    """``[B]`` ``E_cy`` of mixed concepts ``[B, K]`` and classes ``[B, L]``."""
    parts = [mixed(pair, p[:, k]) for k, pair in enumerate(bottleneck.concept_embeddings)]
    if removed is not None:
        parts = [part * ~removed[:, [k]] for k, part in enumerate(parts)]
    h = bottleneck.to_joint(torch.cat(parts, -1))
    u = normalize(classes @ bottleneck.class_embeddings, dim=-1)
    return torch.relu(h + h * u) @ bottleneck.joint_weight


def total_energy(
    bottleneck: EnergyBottleneck,
    x: Tensor,
    p: Tensor,
    classes: Tensor,
    weights: tuple[float, float, float],
    removed: Tensor | None = None,
    exclusive: bool = True,
) -> Tensor:
    """``[B]`` the weighted sum; labels that do not exclude each other have an energy each."""
    gone = torch.zeros_like(p, dtype=torch.bool) if removed is None else removed
    concepts = sum(concept_energy(bottleneck, x, k, p[:, k]) * ~gone[:, k] for k in range(p.shape[1]))
    if exclusive:
        own, joint = class_energy(bottleneck, x, classes), joint_energy(bottleneck, p, classes, gone)
    else:
        single = torch.eye(classes.shape[1], dtype=classes.dtype)
        each = range(classes.shape[1])
        own = sum(classes[:, y] * class_energy(bottleneck, x, single[y].expand_as(classes)) for y in each)
        joint = sum(classes[:, y] * joint_energy(bottleneck, p, single[y].expand_as(classes), gone) for y in each)
    return weights[0] * own + weights[1] * concepts + weights[2] * joint


def one_hot_energies(bottleneck: EnergyBottleneck, x: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, L]`` ``E_xy`` and ``[B, K, 2]`` ``E_xc``, absent and present."""
    single = torch.eye(len(bottleneck.class_embeddings), dtype=x.dtype)
    classes = torch.stack([class_energy(bottleneck, x, row.expand(len(x), -1)) for row in single], 1)
    count = len(bottleneck.concept_embeddings)
    absent, present = (
        torch.stack([concept_energy(bottleneck, x, k, torch.full_like(x[:, 0], p)) for k in range(count)], 1)
        for p in (0.0, 1.0)
    )
    return classes, torch.stack([absent, present], -1)


def one_hot_joint(bottleneck: EnergyBottleneck, p: Tensor) -> Tensor:
    """``[B, L]`` ``E_cy``."""
    single = torch.eye(len(bottleneck.class_embeddings), dtype=p.dtype)
    return torch.stack([joint_energy(bottleneck, p, row.expand(len(p), -1)) for row in single], 1)


def inputs(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def told(n: int = 6, concepts: int = 3, **values: float) -> Intervention:
    """The same corrections in every sample: ``c0=1.0``."""
    mask, given = torch.zeros(n, concepts, dtype=torch.bool), torch.full((n, concepts), 0.5)
    for name, value in values.items():
        mask[:, int(name[1:])], given[:, int(name[1:])] = True, value
    return Intervention(mask, given)

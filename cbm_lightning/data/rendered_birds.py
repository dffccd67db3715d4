"""`RenderedBirds`: drawn birds with exact concepts, pixel masks and a known best accuracy; no files, no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import ConceptDataModule, TensorDataset
from cbm_lightning.data.birds.annotate import Annotation, ConceptLabels, MissingBy, Vocabulary, seen_values
from cbm_lightning.data.birds.attributes import ATTRIBUTES, EVENTS, NUISANCES, Group, check_share, find_groups
from cbm_lightning.data.birds.batches import BirdBatches
from cbm_lightning.data.birds.captions import listing, phrases
from cbm_lightning.data.birds.population import Population
from cbm_lightning.data.birds.rules import LabelRule, Rule, combination
from cbm_lightning.data.birds.scene import Nuisances
from cbm_lightning.data.birds.splits import BirdSplit
from cbm_lightning.data.birds.style import Style
from cbm_lightning.randomness import Randomness

Split = Literal["train", "val", "test"]


class RenderedBirds(ConceptDataModule):
    """Drawn birds of a few species: the data set that needs no files.

    Birds have ten attributes, which make 25 concepts: colours of body, wing and head (red, yellow, blue, black), beak
    (thick, long, hooked), tail (fan, long, forked), belly pattern (plain, spotted, striped), long legs, crest, wing
    bar and eye ring. A species has a prototype of them, from which each bird may differ. Everything that makes such
    data hard is an option: spurious backgrounds, occlusion, ambiguity, correlated or missing or noisy concepts, values
    substituted at test time, combinations never seen in training, shifts of style. Image ``i`` of a split is the same
    however many are drawn.

    Batches hold ``image [B,3,H,H]`` (normalised as the backbone in training wants it, otherwise in [0, 1]), ``label``,
    ``concepts``, ``group`` (twice the label, plus one where the background is the one of the class) and ``index``;
    more on request, see the options below.

    Args:
        num_train: Images in the training split.
        num_val: Images in the validation split, drawn as for training and annotated exactly.
        num_test: Images in the test split, annotated exactly.
        size: Pixels a side, at least 32.
        num_classes: Number of classes; by default 12, for ``xor`` 2, for ``count`` 5.
        rule: How labels and concepts hang together: ``codebook`` (species with prototypes), or the label is a function
            of the attributes: a random ``table``, the largest of ``linear`` scores, ``xor``, or a ``count``.
        rule_groups: Attributes that the rule reads (not for ``codebook``).
        rule_seed: Seed of prototypes, table or scores. Another one gives new species.
        within_class_variation: Probability that an attribute's value is drawn anew, whatever the label.
        group_correlation: Correlation of chosen attributes, in [0, 1], where their values are drawn anew.
        correlated_groups: The attributes that are correlated; all by default.
        occlusion: Share of images with a leaf in front of the bird.
        hide_part: Share of images in which one attribute is true but not to be seen.
        background_match_train: Probability that a training or validation image has the background of its class; 0.25
            is chance.
        background_match_test: The same for test images; 0 gives the class's own background never.
        swap_test: Share of test images in which one attribute takes a value that is not the bird's own, all else kept.
        held_out: Combinations of values, as ``{"body colour": "red", "beak": "long"}``, that are absent from training
            and validation.
        held_out_test: Share of test images on which a held-out combination is imposed.
        concept_labels: ``instance``: what each image shows; ``class``: the typical values of its class, in all splits.
        annotator_noise: How often each annotator of the training split errs, one rate an annotator; concepts are their
            plurality, and batches have a ``certainty``. Null means exact annotations.
        concept_missing: Share of training annotations left out (NaN).
        missing_by: Whether ``concept_missing`` leaves out whole images or single concepts.
        ambiguity: Share of images in which one attribute is a blend of two values, annotated by a vote with the odds
            of the blend.
        kept_groups: Attributes that have concepts, all by default; may name ``background`` and ``occluder`` too.
        kind: Kind of the concepts of attributes with more than two values: ``binary`` or ``categorical``.
        style: Shift of style: any of ``hue`` (radians), ``blur`` and ``noise`` (standard deviations, in pixels and in
            parts of the range of colours), ``contrast`` and ``scale`` (factors).
        style_splits: Splits that are shifted; by default ``test`` alone.
        frames: Frames a clip. Above 1, batches have ``video [B,T,3,H,H]``, of which ``image`` is the first frame (the
            same still as without frames), and three more attributes (wing flap, hop, passing leaf) come with
            ``frame_concepts [B,T,K]``.
        captions: Give each image a ``caption``, a sentence about some of its visible attributes.
        masks: Give ``concept_masks [B,K,H,H]``, the pixels that show each concept that holds (both of an ambiguous
            pair), nothing in front of them; for clips ``video_masks [B,T,K,H,H]`` too.
        details: Give all that is known of an image: ``part_map [B,H,H]``, ``visible [B,K]`` (enough is to be seen),
            ``true_concepts [B,K]``, ``soft_concepts [B,K]`` (their probability), ``background``, ``hidden_group``,
            ``swapped_group`` (positions in `groups`, -1 for none), ``added_concept`` and ``removed_concept`` (by the
            swap, -1 for none), ``domain`` (1 where style is shifted), and ``video_part_map``.
        batch_size: Samples a batch and process.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of the images and of their order.

    Attributes:
        groups: All that has values: the attributes, for clips the events, then background and occluder. Each knows its
            values, the parts that show it and words for it.

    Raises:
        ValueError: An option is out of range or names what does not exist; the message lists near matches.

    Example:
        >>> birds = RenderedBirds(num_train=64, num_val=16, num_test=16, masks=True, batch_size=8)
        >>> birds.setup("fit")
        >>> batch = next(iter(birds.train_dataloader()))
        >>> list(batch["image"].shape), list(batch["concept_masks"].shape)
        ([8, 3, 64, 64], [8, 25, 64, 64])
        >>> round(birds.bayes_accuracy(), 3), round(birds.bayes_accuracy(["beak: long", "crest: present"]), 3)
        (0.996, 0.301)
    """

    def __init__(
        self,
        num_train: int = 8000,
        num_val: int = 1000,
        num_test: int = 2000,
        size: int = 64,
        num_classes: int | None = None,
        rule: Rule = "codebook",
        rule_groups: list[str] | None = None,
        rule_seed: int = 0,
        within_class_variation: float = 0.1,
        group_correlation: float = 0.0,
        correlated_groups: list[str] | None = None,
        occlusion: float = 0.15,
        hide_part: float = 0.0,
        background_match_train: float = 0.25,
        background_match_test: float = 0.25,
        swap_test: float = 0.0,
        held_out: list[dict[str, str]] | None = None,
        held_out_test: float = 1.0,
        concept_labels: ConceptLabels = "instance",
        annotator_noise: list[float] | None = None,
        concept_missing: float = 0.0,
        missing_by: MissingBy = "image",
        ambiguity: float = 0.0,
        kept_groups: list[str] | None = None,
        kind: Literal["binary", "categorical"] = "binary",
        style: dict[str, float] | None = None,
        style_splits: list[Split] | None = None,
        frames: int = 1,
        captions: bool = False,
        masks: bool = False,
        details: bool = False,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self._numbers = {"train": num_train, "val": num_val, "test": num_test}
        if negative := [f"num_{split}" for split, number in self._numbers.items() if number < 0]:
            raise ValueError(f"{negative[0]}: expected at least 0 images, got {self._numbers}")
        _check_choice("concept_labels", concept_labels, get_args(ConceptLabels))
        _check_choice("kind", kind, ("binary", "categorical"))
        check_share(background_match_train, "background_match_train")
        check_share(background_match_test, "background_match_test")

        birds = [*ATTRIBUTES, *(EVENTS if frames > 1 else ())]
        self.groups: list[Group] = [*birds, *NUISANCES]
        self._vocabulary = Vocabulary(find_groups(kept_groups, self.groups, "kept_groups", birds), self.groups)
        self._concept_set = self._vocabulary.concept_set(kind)
        held = [combination(named, birds, "held_out") for named in held_out or ()]
        self._population = Population(
            LabelRule(rule, birds, num_classes, rule_groups, rule_seed, held),
            within_class_variation,
            group_correlation,
            correlated_groups,
        )
        nuisances = Nuisances(occlusion, hide_part, ambiguity, background_match_train)
        train = BirdSplit(
            self._population,
            self._vocabulary,
            nuisances,
            Annotation(annotator_noise, concept_missing, missing_by),
            _class_values(self._population, nuisances) if concept_labels == "class" else None,
            excluded=held,
            size=size,
            frames=frames,
            captions=captions,
            parts=masks or details,
            details=details,
        )
        val = replace(train, annotation=Annotation())
        unfamiliar = replace(nuisances, background_match=background_match_test)
        test = replace(val, nuisances=unfamiliar, excluded=(), forced=held, forced_share=held_out_test, swap=swap_test)
        self._recipes = {"train": train, "val": val, "test": test}
        for split in ("test",) if style_splits is None else style_splits:
            _check_choice("style_splits", split, get_args(Split))
            self._recipes[split] = self._recipes[split].restyled(Style.make(style))
        self._batches = BirdBatches(self.concept_parts, birds, masks=masks, details=details)

    @property
    def concept_set(self) -> ConceptSet:
        """The concepts of the kept groups: 25 by default, three more for clips."""
        return self._concept_set

    @property
    def class_names(self) -> list[str]:
        """``species 1`` and so on."""
        return [f"species {number + 1}" for number in range(self._population.rule.classes)]

    @property
    def concept_parts(self) -> Tensor:
        """``[K, parts]`` bool, the parts of the part map (`birds.attributes.Part`) whose pixels show each concept."""
        return self._vocabulary.parts()

    @property
    def class_descriptions(self) -> list[str]:
        """A sentence a class that names all typical attributes: what a text encoder needs to know of the class."""
        return [f"a bird with {listing(list(parts.values()))}" for parts in self.part_descriptions]

    @property
    def part_descriptions(self) -> list[dict[str, str]]:
        """Attribute to words, one mapping a class, such as ``{"beak": "a hooked beak", ...}``."""
        birds = self._population.groups
        names = [group.name for group in birds]
        return [dict(zip(names, phrases(birds, row), strict=True)) for row in self._population.typical.tolist()]

    def bayes_accuracy(self, concepts: Sequence[str] | None = None, split: Split = "test") -> float:
        """The best accuracy that any classifier of the label can reach from the true values of some concepts.

        A model whose label accuracy lies above it reads something else than these concepts. It is the exact sum, over
        all that the concepts can show, of the probability of the likeliest class then; within-class variation,
        correlated groups and, if ``background`` is among the concepts, its match with the class are taken into
        account. The concepts are those that the bird has, seen or not, without ambiguity or annotators' errors; swaps
        and held-out combinations, which are meant to break this law, are not part of it.

        Args:
            concepts: Names of concepts, of any group kept or not; None means the concepts of this data set.
            split: The split whose backgrounds count.

        Raises:
            ValueError: A name is unknown.
        """
        seen = seen_values(self.groups, self.concept_set.names if concepts is None else concepts)
        number = len(self._population.groups)
        joint = self._population.label_and(seen[:number]).flatten(1)
        background = self._recipes[split].nuisances.background_law(self.num_classes) @ seen[number]
        return float((joint[:, :, None] * background[:, None]).flatten(1).max(0).values.sum())

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        """``(concepts [N, K], labels [N])`` of a split; draws no image."""
        return self._recipes[split].annotations(self._randomness(split))

    def setup(self, stage: str | None = None) -> None:
        """Draw the splits that a stage needs, each once, and follow the backbone in training in their pixels."""
        super().setup(stage)
        backbone = self.backbone()
        batches = replace(self._batches, stats=None if backbone is None else backbone.image_stats())
        for dataset in self.splits.values():
            if isinstance(dataset, TensorDataset):
                dataset.transform = batches

    def make_split(self, name: str) -> TensorDataset:
        """Draw a split, a few thousand images a second."""
        return TensorDataset(self._recipes[name].rows(self._randomness(name)), self._batches)

    def _randomness(self, split: str) -> Randomness:
        return Randomness(self.seed, split, torch.arange(self._numbers[split]))


def _class_values(population: Population, nuisances: Nuisances) -> Tensor:
    """``[L, G]`` the typical value of each group, nuisances included, in each class."""
    typical = population.typical
    background = nuisances.background_law(len(typical)).argmax(1)
    occluder = torch.full_like(background, int(nuisances.occlusion > 0.5))
    return torch.cat([typical, torch.stack([background, occluder], dim=1)], dim=1)


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field}: expected one of {list(choices)}, got {value!r}")

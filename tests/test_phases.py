from __future__ import annotations

import pytest

from cbm_lightning.phases import Phase, make_phases, phase_starts


def test_presets_follow_koh_et_al() -> None:
    concepts, labels = make_phases("sequential")
    assert (list(concepts.train), concepts.loss_weights) == (["backbone", "bottleneck"], {"label": 0.0})
    assert (list(labels.train), labels.head_input, labels.loss_weights) == (["head"], "predicted", {"concept": 0.0})
    assert make_phases("independent")[1].head_input == "true"
    assert len(make_phases("joint")) == 1


def test_phases_survive_their_plain_form() -> None:
    phase = Phase("labels", ["head"], 3, "true", {"concept": 0.0}, 0.1)
    assert make_phases([phase.to_dict()]) == [phase]


@pytest.mark.parametrize(
    ("epochs", "max_epochs", "starts"),
    [
        ([None], 7, [0]),
        ([None], -1, [0]),
        ([None, None], 7, [0, 4]),
        ([3, None], 10, [0, 3]),
        ([None, 3], 10, [0, 7]),
        ([3, 4], 7, [0, 3]),
        ([2, None, None], 7, [0, 2, 5]),
        ([3, None], None, [0, 3]),
    ],
)
def test_epochs_are_shared_among_the_phases(epochs, max_epochs, starts) -> None:
    assert phase_starts([Phase(str(i), epochs=n) for i, n in enumerate(epochs)], max_epochs) == starts


@pytest.mark.parametrize(("epochs", "max_epochs"), [([3, 4], 8), ([3, 4], 6), ([3, None], 3), ([None, None], 1)])
def test_a_conflict_says_both_numbers(epochs, max_epochs) -> None:
    fixed = sum(n or 0 for n in epochs)
    with pytest.raises(ValueError, match=rf"take {fixed} epochs.*max_epochs is {max_epochs}"):
        phase_starts([Phase(str(i), epochs=n) for i, n in enumerate(epochs)], max_epochs)


def test_an_open_end_is_for_the_last_phase_only() -> None:
    with pytest.raises(ValueError, match="no max_epochs to share"):
        phase_starts(make_phases("sequential"), -1)


@pytest.mark.parametrize(
    "options", [{"train": ["body"]}, {"train": []}, {"epochs": 0}, {"head_input": "labels"}, {"lr": 0.0}]
)
def test_bad_options_name_phase_and_field(options) -> None:
    with pytest.raises(ValueError, match=f"phase 'p': {next(iter(options))}:"):
        Phase("p", **options)


@pytest.mark.parametrize("source", ["jointly", [], [Phase("a"), Phase("a")]])
def test_bad_lists(source) -> None:
    with pytest.raises(ValueError, match="^phases:"):
        make_phases(source)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of `ddp_script` left behind."""
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, str(TESTS / "ddp_script.py"), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def after(runs: Path, name: str, rank: int, epoch: int) -> dict[str, Tensor]:
    """The weights of a process after an epoch."""
    state: dict[str, Tensor] = torch.load(runs / f"{name} ranks" / f"rank {rank} epoch {epoch}.pt", weights_only=True)
    return state


def trained_alike(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without BatchNorm's running statistics, which every process keeps for itself until the next batch."""
    return {name: tensor for name, tensor in state.items() if "running" not in name}


@pytest.mark.parametrize("name", ["defaults", "all scores", "real concepts"])
def test_two_processes_score_like_one(runs: Path, name: str) -> None:
    scores: dict[str, Any] = json.loads((runs / "scores.json").read_text())[name]
    one, two = scores["1"], scores["2"]
    assert one.keys() == two.keys()
    expected = {"loss", "loss_label", "loss_concept", "label_acc", "concept_acc", "concept_joint_acc"}
    expected |= {"concept_auroc", "concept_ap", "concept_ece"}
    assert {f"{stage}/{key}" for stage in ("val", "test") for key in expected} <= one.keys()
    assert ("test/concept_mae" in one) == (name == "real concepts")
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("name", ["joint", "sequential", "resumed"])
def test_processes_hold_the_same_weights(runs: Path, name: str) -> None:
    first, second = (trained_alike(after(runs, name, rank, 3)) for rank in (0, 1))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_value_ranges_come_from_all_processes(runs: Path) -> None:
    ranges = [after(runs, "joint", rank, 3)["bottleneck.value_range"] for rank in (0, 1)]
    assert torch.equal(*ranges)
    assert (ranges[0].abs() != 5.0).all()


def test_frozen_parts_stand_still_on_every_process(runs: Path) -> None:
    for rank in (0, 1):
        before, at_end = (after(runs, "sequential", rank, epoch) for epoch in (1, 3))
        moved = {key.split(".")[0] for key in before if not torch.equal(before[key], at_end[key])}
        assert moved == {"head"}


def test_a_resumed_run_ends_with_the_same_weights(runs: Path) -> None:
    whole, resumed = after(runs, "sequential", 0, 3), after(runs, "resumed", 0, 3)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_one_process_writes_and_the_states_of_both_are_in_the_file(runs: Path) -> None:
    assert sorted(path.name for path in (runs / "joint").iterdir()) == [f"epoch={epoch}.ckpt" for epoch in range(4)]
    content = torch.load(runs / "joint" / "epoch=3.ckpt", weights_only=True)
    assert len(content["cbm_lightning"]["rng"]) == 2
    assert all(not key.startswith("module.") for key in content["state_dict"])


def test_plain_ddp_is_refused_where_it_would_stop_at_unused_parameters(runs: Path) -> None:
    said = json.loads((runs / "refused.json").read_text())
    advice = "set the Trainer's strategy to 'ddp_find_unused_parameters_true'"
    assert "phase 'concepts' leaves the parameters of ['head'] unused" in said["sequential"]
    assert "phase 'joint' leaves the parameters of ['head'] unused" in said["no label"]
    assert all(advice in text for text in said.values())


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_interventions_on_two_processes_are_those_on_one(runs: Path, name: str) -> None:
    [one, *two] = (
        torch.load(runs / "curves" / f"{name} {processes}" / f"rank {rank}.pt", weights_only=True)
        for processes, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert one["samples"] == [41, 41]
    batch_scope = {"rand_batch", "ucp_batch", "ectp_batch"}
    assert one["curves"].keys() == {"rand", "ucp", "global_improvement"} | batch_scope
    for found in two:
        assert found["samples"] == [41, 41]
        for policy, curves in one["curves"].items():
            assert curves.keys() == found["curves"][policy].keys()
            assert ("worst_group" in curves) == (name == "plain")
            for key, curve in curves.items():
                # a loss is a sum in another order, all else are counts
                tolerance = {"rtol": 1e-6, "atol": 1e-6} if key == "loss" else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(found["curves"][policy][key], curve, equal_nan=True, **tolerance)
    # the policies do not all do the same
    assert len({tuple(curves["loss"][0].tolist()) for curves in one["curves"].values()}) == 6


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_the_scalars_of_interventions_are_logged_once_for_all_processes(runs: Path, name: str) -> None:
    one, two = (json.loads((runs / "curves" / f"{name} {n}" / "scores.json").read_text()) for n in (1, 2))
    logged = [key for key in one if "/intervention/" in key or "/batch/" in key]
    assert {"test/intervention/rand/auc", "test/batch/ectp_batch/final"} <= set(logged)
    assert {key: two[key] for key in logged} == pytest.approx({key: one[key] for key in logged}, abs=1e-5)


@pytest.mark.parametrize("scope", ["single", "batch"])
def test_a_process_without_a_sample_takes_part(runs: Path, scope: str) -> None:
    said = json.loads((runs / "few.json").read_text())
    assert scope not in said
    assert said[f"test/intervention/{scope}/worst_group_auc"] == said[f"test/intervention/{scope}/auc"]


def test_a_checkpoint_can_follow_interventions_on_two_processes(runs: Path) -> None:
    content = torch.load(runs / "watched" / "epoch=0.ckpt", weights_only=True)
    [kept] = [state for name, state in content["callbacks"].items() if name.startswith("InterventionEvaluation")]
    assert kept["values"]["logit_range"].shape == (2, 4)

"""Every bottleneck on two processes: the same weights everywhere, and the scores of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bottlenecks.contract import CASES

TESTS = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    done = subprocess.run(
        [sys.executable, str(TESTS / "bottlenecks" / "contract_ddp.py"), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_score_like_one(runs: Path, name: str) -> None:
    found = json.loads((runs / "scores.json").read_text())[name]
    assert "error" not in found, found["error"]
    assert found["one"].keys() == found["two"].keys()
    for key, value in found["one"].items():
        if CASES[name].compares and "loss" in key:
            continue
        assert found["two"][key] == pytest.approx(value, abs=1e-5), key
    first, second = (torch.load(runs / name / f"rank {rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []

"""Every code block of the README runs: Python as it stands, diffs before and after, commands by the same entry."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from cbm_lightning import CBMModule
from cbm_lightning.backbones import TimmBackbone
from cbm_lightning.cli import main
from cbm_lightning.data import RenderedBirds

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
INLINE = re.findall(r"`((?:cbm|python) [^`]+)`", README)


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


@pytest.fixture(autouse=True)
def _user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README takes for granted: images with a table, a checkpoint, a project with a datamodule."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbm"])
    folder = tmp_path / "my_birds"
    folder.mkdir()
    rows = ["image,label,colour: red,colour: blue,round"]
    for i in range(36):
        red = i % 2
        Image.new("RGB", (48, 48), (220, 40 + i, 40) if red else (40, 40 + i, 220)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'robin' if red else 'jay'},{red},{1 - red},{i % 3 == 0:d}")
    (folder / "table.csv").write_text("\n".join(rows))


def my_project() -> types.ModuleType:
    class MyDataModule(pl.LightningDataModule):
        def loader(self) -> DataLoader:
            rows = TensorDataset(torch.rand(8, 3, 32, 32), torch.randint(0, 2, (8, 4)), torch.randint(0, 3, (8,)))
            return DataLoader(rows, batch_size=4)

        train_dataloader = val_dataloader = test_dataloader = loader

    class MyClassifier(pl.LightningModule):
        def __init__(self, name: str, num_classes: int) -> None:
            super().__init__()
            self.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[2])

        def test_step(self, batch, batch_idx):
            self.log("test/loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            self.network(torch.rand(1, 3, 32, 32))
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = types.ModuleType("my_project")
    module.MyDataModule, module.MyClassifier = MyDataModule, MyClassifier
    return module


def quickly(code: str) -> str:
    """The code with few epochs, without a download, and without warnings about what is only a matter of speed."""
    code = code.replace("pretrained=True", "pretrained=False")
    # a run of two phases needs two epochs
    epochs = 2 if "Phase(" in code else 1
    return re.sub(
        r"pl\.Trainer\(max_epochs=\d+",
        f'pl.Trainer(max_epochs={epochs}, accelerator="cpu", logger=False, log_every_n_steps=1',
        code,
    )


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("diff", blocks("diff"))
def test_diffs_run_on_both_sides(diff: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = "+" if side == "before" else "-"
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(dropped))
    monkeypatch.setitem(sys.modules, "my_project", my_project())
    scope: dict[str, object] = {}
    exec(quickly(code), scope)
    assert isinstance(scope["model"], CBMModule) == (side == "after")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # two runs without a logger
@pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    if "best.ckpt" in code:
        model = CBMModule(TimmBackbone("test_resnet.r160_in1k", img_size=64), data=RenderedBirds())
        trainer = pl.Trainer(logger=False, accelerator="cpu")
        trainer.strategy.connect(model)
        trainer.save_checkpoint("best.ckpt")
    exec(quickly(code), {})


def commands() -> list[str]:
    lines = [line.strip() for code in blocks("bash") for line in code.splitlines() if line.strip()]
    return [part.strip() for line in [*lines, *INLINE] for part in line.split("&&")]


@pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_run(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["cbm", "fit"] and "NAME" not in command:
        short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
        short += ["--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        short += ["--model.backbone.pretrained=false", "--trainer.log_every_n_steps=1"]
        small = ["--data.num_train=64", "--data.num_val=16", "--data.num_test=16"] if "quickstart" in words else []
        cli = main([*words[1:], *short, *small])
        assert "test/label_acc" in cli.trainer.callback_metrics
    elif words[0] == "python":
        script = REPOSITORY / words[1]
        helped = subprocess.run(
            [sys.executable, script, "--help"], capture_output=True, text=True, cwd=REPOSITORY, env=_with_package()
        )
        assert helped.returncode == 0, helped.stderr
        for flag in (word for word in words[2:] if word.startswith("--")):
            assert flag in helped.stdout, f"{words[1]} has no option {flag}"
    elif words[0] in ("pip", "pytest"):
        # these two run in .ci/run, in a fresh environment
        assert command in (REPOSITORY / ".ci" / "run").read_text().replace("--quiet ", "") or command == "pip install ."
    else:
        assert words[0] == "cbm"
        assert words[1] in ("fit", "test", "validate", "predict")


def _with_package() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_the_recipe_table_names_every_recipe() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    shipped = {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert shipped <= named


def test_commands_begin_with_a_system_that_fragments_add_to() -> None:
    systems = {
        path.stem: "model" in yaml.safe_load(path.read_text()) for path in (REPOSITORY / "recipes").glob("*.yaml")
    }
    for command in commands():
        words = shlex.split(command)
        named = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        recipes = [name for name in named if name != "NAME" and not name.endswith(".yaml")]
        assert set(recipes) <= systems.keys(), command
        assert [systems[name] for name in recipes] == [i == 0 for i in range(len(recipes))], command


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (REPOSITORY / path).stat().st_size > 10_000

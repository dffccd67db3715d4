"""``cbm fit|validate|test|predict``: a LightningCLI that knows the recipes and links the data to the model."""

from __future__ import annotations

import traceback
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

# imported so that YAML files and flags can use their short names
from cbm_lightning import backbones, bottlenecks, callbacks, data, heads, losses, module  # noqa: F401
from cbm_lightning.checkpoints import read_checkpoint
from cbm_lightning.configurable import Part
from cbm_lightning.data import ConceptDataModule
from cbm_lightning.explanation import prediction_table


class RecipeFile(ActionConfigFile):
    """``--config quickstart`` reads the packaged recipe ``quickstart.yaml`` where no such file exists."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Resolve a recipe name, then read the file.

        Raises:
            SystemExit: There is neither a file nor a recipe of that name; the message lists the recipes.
        """
        if not Path(values).is_file():
            packaged = {Path(str(recipe)).stem: recipe for recipe in files("cbm_lightning.recipes").iterdir()}
            if values in packaged and str(packaged[values]).endswith(".yaml"):
                values = str(packaged[values])
            elif not str(values).lstrip().startswith("{"):
                names = sorted(name for name, recipe in packaged.items() if str(recipe).endswith(".yaml"))
                parser.error(f"no file and no recipe is called {values!r}; the recipes are {names}")
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


class SaveResolvedConfig(SaveConfigCallback):
    """Writes the resolved configuration of a ``fit`` beside the checkpoints and into each of them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; a later ``test`` in the same folder must not replace it."""
        if stage == "fit":
            if isinstance(data := getattr(trainer, "datamodule", None), ConceptDataModule):
                data.setup(
                    "test"
                )  # the run ends with a test, so what is wrong with that split is said before it begins
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the YAML text under the key ``config``."""
        checkpoint["config"] = self.parser.dump(self.config, skip_unset=False)


class CBMCommandLine(LightningCLI):
    """The command line: any LightningModule with any LightningDataModule, configured by YAML and flags."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose ``--config`` knows the recipes."""
        kwargs.setdefault("dump_header", ["cbm-lightning"])
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="A YAML file, or the name of a recipe.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Hand the datamodule to the model, which asks it for what the user did not type."""
        parser.link_arguments("data", "model.init_args.data", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Read the hyper-parameters of ``--ckpt_path``.

        Raises:
            ValueError: The file is damaged.
        """
        try:
            super()._parse_ckpt_path()
        except Exception:
            # names the file if it is to blame
            read_checkpoint(self.config[self.config.subcommand].ckpt_path)
            raise

    def before_instantiate_classes(self) -> None:
        """Remember what a class raised: where a type is a union, jsonargparse hands on no more than its text."""
        self._failure: Exception | None = None
        for kind in (Part, LightningDataModule):
            self.parser.add_instantiator(self._make, kind)

    def _make(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return cls(*args, **kwargs)
        except Exception as error:
            self._failure = self._failure or error
            raise

    def instantiate_classes(self) -> None:
        """Make data, model and Trainer.

        Raises:
            Exception: What the class itself raised, without the whole configuration that jsonargparse wraps around it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            shown: BaseException = self._failure or error
            while _is_wrapper(shown) and shown.__cause__ is not None:
                shown = shown.__cause__
            raise shown from shown.__cause__

    def before_test(self) -> None:
        """Warn where ``test`` would judge weights that nobody trained; what has none to train is judged as it is."""
        trainable = any(weight.requires_grad for weight in self.model.parameters())
        if trainable and not self.config["test"].get("ckpt_path"):
            warnings.warn("cbm test without --ckpt_path judges the weights that the model starts with", stacklevel=2)

    def after_fit(self) -> None:
        """Test the best checkpoint, or the last weights where none was ranked."""
        loader = getattr(type(self.datamodule), "test_dataloader", LightningDataModule.test_dataloader)
        if loader is LightningDataModule.test_dataloader:
            return
        checkpoint = self.trainer.checkpoint_callback
        ranked = getattr(checkpoint, "best_model_path", "") and getattr(checkpoint, "monitor", None)
        self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path="best" if ranked else None, weights_only=True
        )
        ceiling = self.datamodule.bayes_accuracy() if isinstance(self.datamodule, ConceptDataModule) else None
        if ceiling is not None:
            rank_zero_info(f"The best label accuracy that the true concepts allow on this data is {ceiling:.3f}.")

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write ``predictions.csv`` (one file a process) beside the logs, a row a sample."""
        predictions = self.trainer.predict(**kwargs)
        if not predictions or not isinstance(self.model, module.CBMModule):
            return
        table = prediction_table(self.model, predictions)
        rank = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / f"predictions{rank}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        table.to_csv(draft, index=False)
        draft.replace(path)
        rank_zero_info(f"{len(table)} predictions are in {path}.")


def _is_wrapper(error: BaseException) -> bool:
    """Whether jsonargparse itself raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("jsonargparse.")


def main(args: list[str] | None = None) -> CBMCommandLine:
    """Run ``cbm``; the arguments are those of the shell by default."""
    # frozen parts are in evaluation mode on purpose, and Lightning's own use of pytrees is no user's concern
    warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    return CBMCommandLine(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveResolvedConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=args,
    )


def command() -> None:
    """The console script ``cbm``: `main` without a result, which the shell would take for a failure."""
    main()

"""Starting from a checkpoint: its parameters, and what of its folder a workdir keeps."""

import shutil
from pathlib import Path
from typing import Any

from flax import nnx

from bdia_jax import interop
from train.config import Config

FOLDER = "pretrained"  # in a workdir


def read_params(config: Config, model: Any) -> Any:
    """The parameters of `config.init_from`, as a nested dict; None without one.

    Args:
        model: an abstract one, of the checkpoint's architecture. A head for another number of
            classes is not read.

    Raises:
        FileNotFoundError, ValueError: as `interop.read_params`.
    """
    if not config.init_from:
        return None
    arguments = interop.read_architecture(config.init_from).arguments
    keep = ()
    if "num_classes" in arguments and arguments["num_classes"] != model.head.out_features:
        keep = ("head",)
    return nnx.to_pure_dict(interop.read_params(config.init_from, model, keep))


def keep_description(config: Config, workdir: Path) -> None:
    """Copies what the folder holds beside its weights, to open and export the run without it."""
    source, folder = Path(config.init_from), workdir / FOLDER
    folder.mkdir(exist_ok=True)
    if (folder / "config.json").exists():  # the last of them
        return
    if not has_own_tokenizer(config):
        interop.copy_beside(source, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")


def has_own_tokenizer(config: Config) -> bool:
    """Whether the run has another tokenizer than the checkpoint, so that other ids end a text."""
    return config.input.tokenizer_name in ("bytes", "bpe")

"""Starting from a checkpoint: its parameters, and what of its folder a workdir keeps."""

import shutil
from pathlib import Path
from typing import Any

from flax import nnx

from bdia_jax import interop
from train.config import Config

FOLDER = "pretrained"  # in a workdir
_KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


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
    """Copies config.json and tokenizer into the workdir, to open the run without the folder."""
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    own_tokenizer = config.input.tokenizer_name == "bytes"  # and not the checkpoint's
    for name in _KEPT[:1] if own_tokenizer else _KEPT:
        source = Path(config.init_from) / name
        if source.exists() and not (folder / name).exists():
            shutil.copyfile(source, folder / name)

"""Opening what was trained: a workdir of `python -m train`, or a Hugging Face folder."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from bdia_jax import interop, lora
from train.config import Config
from train.data.tokens import Bpe, Tokenizer, open_tokenizer
from train.loop.state import Training
from train.run.checkpoint import Checkpoints
from train.run.missing import is_bereft, no_checkpoint, no_config
from train.run.pretrained import FOLDER, has_own_tokenizer
from train.run.workdir import read_config
from train.tasks import abstract_task


class Run(NamedTuple):
    """A trained model and what belongs to it.

    model: in evaluation mode, of the first seed, its adapters merged.
    tokenizer: None for images, and where a Hugging Face folder has none.
    config: of the run; None for a Hugging Face folder.
    end_tokens: each ends a text, as the checkpoint's folder says; None where it does not, so that
        it is the tokenizer's end_of_text.
    """

    model: nnx.Module
    tokenizer: Tokenizer | None
    config: Config | None
    end_tokens: tuple[int, ...] | None = None


def open_run(folder: str | Path, data_dir: str = "", *, best: bool = False) -> Run:
    """The model of a workdir's newest checkpoint, or of a Hugging Face folder.

    Args:
        folder: either of them. What a run was initialized from is not needed any more.
        data_dir: where TFDS keeps its data, "" for the run's; only images need theirs, for the
            size and the number of classes.
        best: the checkpoint with the best evaluation instead of the newest.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it yet.
        ValueError: it is neither of the two.
    """
    path = Path(folder).absolute()
    file = path / "config.json"
    if not file.exists():
        if is_bereft(path):
            raise FileNotFoundError(no_config(path))
        raise FileNotFoundError(
            f"{file} does not exist; {folder} has to be a workdir of python -m train or a Hugging "
            "Face folder"
        )
    try:
        is_hugging_face = "model_type" in json.loads(file.read_text("utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no config.json: {error}") from error
    if is_hugging_face:
        model = interop.load(path, rngs=nnx.Rngs(0))
        model.eval()
        ends = interop.read_end_tokens(path)
        if not (path / "tokenizer.json").exists():
            return Run(model, None, None, ends or None)
        return Run(model, open_tokenizer("checkpoint", path), None, ends)
    config = read_config(path)
    if not (path / "checkpoints").exists():
        raise FileNotFoundError(no_checkpoint(path))
    if data_dir:
        config = dataclasses.replace(config, data_dir=data_dir)
    if config.init_from:
        config = dataclasses.replace(config, init_from=str(path / FOLDER))
    tokenizer = _tokenizer(path, config)
    training = Training(config, abstract_task(config, tokenizer).make_model)
    with Checkpoints(path, read_only=True) as checkpoints:  # it may be training still
        state = checkpoints.restore(training.abstract_state, best=best)
    model = training.models(state)[0]
    lora.merge(model)
    return Run(model, tokenizer, config, end_tokens(config, tokenizer, path / FOLDER))


def end_tokens(config: Config, tokenizer: Tokenizer | None, folder: Path) -> tuple[int, ...] | None:
    """Each ends a text of a run: the one it was trained with, and those of its checkpoint.

    None: it has no checkpoint with the same tokenizer.
    """
    if tokenizer is None or not config.init_from or has_own_tokenizer(config):
        return None
    return tuple(dict.fromkeys((tokenizer.end_of_text, *interop.read_end_tokens(folder))))


def _tokenizer(path: Path, config: Config) -> Tokenizer | None:
    name = config.input.tokenizer_name
    if name == "bpe":
        return Bpe.load(path / "tokenizer.json")
    return open_tokenizer(name, config.init_from) if name else None

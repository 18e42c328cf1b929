"""A trained run as a Hugging Face folder, which any standard runtime loads.

    python -m train.export --from runs/e2e --to exported

Adapters are merged. The folder has config.json and model.safetensors; of a byte-pair encoding
tokenizer.json; and of a run that started from a checkpoint what the checkpoint's folder held beside
weights and code: tokenizer, chat template, generation_config.json, licence.
"""

import argparse
import json
import tempfile
from pathlib import Path

from bdia_jax import interop
from train.cli import parse_args, told
from train.data.tokens import Bpe
from train.inference.open_run import Run, open_run
from train.run.pretrained import FOLDER, has_own_tokenizer


def export(workdir: Path, folder: Path, data_dir: str = "") -> None:
    """Writes what `workdir` trained into `folder`.

    Raises:
        FileNotFoundError, ValueError: as `open_run` and `interop.save`.
    """
    run = open_run(workdir, data_dir)
    if run.config is None:
        raise ValueError(f"{workdir} is a Hugging Face folder already")
    with tempfile.TemporaryDirectory() as made:
        source = workdir / FOLDER
        if not run.config.init_from or has_own_tokenizer(run.config):
            source = _describe(run, workdir, Path(made))
        interop.save(run.model, folder, source=source)


def _describe(run: Run, workdir: Path, folder: Path) -> Path:
    """The folder, with what config.json has to say besides the architecture, and the tokenizer."""
    file = workdir / FOLDER / "config.json"
    settings = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if run.tokenizer is not None:
        end = run.tokenizer.end_of_text
        settings |= {"bos_token_id": end, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    if isinstance(run.tokenizer, Bpe):
        run.tokenizer.save(folder / "tokenizer.json")
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--from", dest="workdir", type=Path, required=True, help="a workdir")
    parser.add_argument("--to", dest="folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps its data")
    args = parse_args(parser, argv)
    with told():
        export(args.workdir, args.folder, args.data_dir)
    print(f"{args.folder} can be loaded by transformers' from_pretrained")


if __name__ == "__main__":
    main()

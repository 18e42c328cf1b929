"""A trained run as a Hugging Face folder, which any standard runtime loads.

    python -m train.export --from runs/e2e --to exported

Adapters are merged. The folder has config.json, model.safetensors and, of a byte-pair encoding,
tokenizer.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

from bdia_jax import interop
from train.cli import parse_args, told
from train.data.tokens import Bpe
from train.inference.open_run import Run, open_run
from train.run.pretrained import FOLDER


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
        if not source.exists():
            source = Path(made)
            _describe(run, source)
        interop.save(run.model, folder, source=source)


def _describe(run: Run, folder: Path) -> None:
    """What config.json has to say besides the architecture, and the tokenizer."""
    settings = {}
    if run.tokenizer is not None:
        end = run.tokenizer.end_of_text
        settings = {"bos_token_id": end, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    if isinstance(run.tokenizer, Bpe):
        run.tokenizer.save(folder / "tokenizer.json")


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

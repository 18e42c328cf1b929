"""A GGUF file as a Hugging Face folder in float32: python -m benchmarks.from_gguf FILE.gguf FOLDER

By transformers, which needs `pip install gguf accelerate` for it. Quantized weights come out as the
numbers that they stand for.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> None:
    """Writes weights, config.json and the tokenizer."""
    options = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    options.add_argument("file", type=Path)
    options.add_argument("folder", type=Path)
    args = options.parse_args(argv)
    import torch  # not installed with the benchmarks
    import transformers

    source: dict[str, Any] = {"gguf_file": args.file.name}
    auto: Any = transformers.AutoModelForCausalLM
    read = auto.from_pretrained(args.file.parent, **source)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(args.file.parent, **source)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = auto.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main(sys.argv[1:])

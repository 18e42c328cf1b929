"""Text from a trained model: python -m train.generate --from runs/gpt2 --prompt "Once upon a time"

--from is a workdir of `python -m train`, or a folder with a Hugging Face checkpoint. GPT-2 and
Llama continue every --prompt, a Transformer translates every --source. What is evaluated is the
standard network, gamma 0. A run's states are in fixed point if it was trained so, a checkpoint's
in floating point as in any other runtime.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdia_jax.models.transformer import Transformer
from bdia_jax.text.generate import generate, generate_beam
from train.cli import parse_args, told
from train.data.text import pad_left
from train.data.tokens import Tokenizer, open_tokenizer
from train.inference.open_run import open_run
from train.tasks import TASKS
from train.tasks.translation import translate_texts


def continue_texts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    ends_prompts: bool = False,
    end_tokens: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes behind each prompt, up to the end of the text or num_tokens tokens.

    Args:
        model: a `bdia_jax.text.generate.CausalLM`.
        tokenizer: the one it was trained with.
        prompts: all continued at once; an empty one begins a new text.
        num_tokens: at most.
        ends_prompts: end of text comes behind each prompt, as `train.tasks.data_to_text` trains.
        end_tokens: each ends a text; None: the tokenizer's end of text alone.
        options: of `generate_beam` if there is a beam_size, else of `generate`.

    Raises:
        ValueError: a tokenizer with more tokens than the model; as `generate`, `generate_beam`.
    """
    end = tokenizer.end_of_text
    encode = partial(tokenizer.encode, special=not ends_prompts)  # as they were trained
    ids = [encode(prompt) + [end] * ends_prompts or [end] for prompt in prompts]
    check_vocabulary(model, max(map(max, ids)))
    rows, lengths = map(jnp.asarray, pad_left(ids, 0))
    options |= {"prompt_lengths": lengths if len(set(map(len, ids))) > 1 else None}
    options["end_token"] = ends = (end,) if end_tokens is None else tuple(end_tokens)
    if options.get("beam_size"):
        new = generate_beam(model, rows, num_tokens, **options)[0]
    else:
        new = generate(model, rows, num_tokens, **options)[:, rows.shape[1] :]
    return [_new_text(tokenizer, *each, ends) for each in zip(ids, new.tolist(), strict=True)]


def _new_text(tokenizer: Tokenizer, prompt: list[int], new: list[int], ends: Sequence[int]) -> str:
    """What is new, up to the first token that ends it, as it reads behind the prompt."""
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    # a vocabulary padded to a round number has tokens that mean nothing
    known = [token for token in new[:length] if token < tokenizer.vocab_size]
    # a text's first token may lose its space
    return tokenizer.decode(prompt + known)[len(tokenizer.decode(prompt)) :]


def check_vocabulary(model: Any, largest: int) -> None:
    """Raises ValueError if a language model has no token `largest`, of which it would make NaN."""

    def logits(model, tokens):
        return model.logits(model.features(tokens))

    size = nnx.eval_shape(logits, model, jax.ShapeDtypeStruct((1, 1), jnp.int32)).shape[-1]
    if largest >= size:
        raise ValueError(
            f"the text has the token {largest}, but the model only {size} tokens; take the "
            "tokenizer it was trained with, by --tokenizer"
        )


def run(args: argparse.Namespace) -> str:
    """What is printed.

    Raises:
        FileNotFoundError: no such file, or the data set of the run is not prepared.
        ValueError: a folder, model or options that do not fit together.
    """
    prompts = [*args.prompt]
    if args.prompt_file:
        prompts += args.prompt_file.read_text("utf-8").splitlines()
    if bool(prompts) == bool(args.source):
        raise ValueError("expected --prompt (or --prompt_file), or else --source")
    opened: Any = open_run(args.folder, data_dir=args.data_dir)
    model = opened.model
    takes = "--source" if isinstance(opened.model, Transformer) else "--prompt"
    takes = takes if hasattr(model, "logits") else "no text"
    if takes != ("--source" if args.source else "--prompt"):
        raise ValueError(f"{args.folder} is a {type(model).__name__}, which takes {takes}")
    tokenizer = choose_tokenizer(args.tokenizer, args.folder, opened.tokenizer)
    if args.source:
        return _translated(model, tokenizer, args)
    if opened.config is None:
        model.stack.fixed_point, model.stack.backprop = None, "store"
    is_run_of_them = opened.config is not None and TASKS[opened.config.task].ends_prompts
    ends_prompts = args.meaning or is_run_of_them
    if args.beam_size:
        penalty = 1.0 if args.length_penalty is None else args.length_penalty
        options = {"beam_size": args.beam_size, "length_penalty": penalty}
        options["no_repeat_ngram"] = args.no_repeat_ngram
    else:
        options = {"temperature": args.temperature, "top_k": args.top_k or None}
        options["key"] = jax.random.key(args.seed)
    options |= {"ends_prompts": ends_prompts, "end_tokens": opened.end_tokens}
    new = continue_texts(model, tokenizer, prompts, args.num_tokens, **options)
    between = "\n" * ends_prompts
    texts = [prompt + between + after for prompt, after in zip(prompts, new, strict=True)]
    return "\n==========\n".join(texts)


def _translated(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace) -> str:
    longest = max(args.source, key=lambda source: len(tokenizer.encode(source)))
    width = len(tokenizer.encode(longest)) + 1  # its end
    if width > model.max_len:
        raise ValueError(
            f"a source has {width} tokens, expected at most {model.max_len}: {longest!r}; split it"
        )
    texts = translate_texts(
        model,
        tokenizer,
        args.source,
        min(args.num_tokens, model.max_len),
        beam_size=args.beam_size or 4,
        length_penalty=0.6 if args.length_penalty is None else args.length_penalty,
    )
    return "\n".join(texts)


def choose_tokenizer(name: str, folder: Path, own: Tokenizer | None) -> Tokenizer:
    """The tokenizer named (see `train.data.tokens.open_tokenizer`), else the folder's own.

    Raises:
        FileNotFoundError, ValueError: as `open_tokenizer`; none named, and the folder has none.
    """
    if name:
        return open_tokenizer(name, folder)
    if own is None:
        raise ValueError(
            f"{folder} has no tokenizer; name the one its model was trained with: "
            "--tokenizer=gpt2, or bytes"
        )
    return own


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    add = options.add_argument
    add("--from", dest="folder", type=Path, required=True, help="a workdir or a checkpoint")
    add("--prompt", action="append", default=[], help="a text to continue; may be repeated")
    add("--meaning", action="store_true", help="prompts are meanings, as for a run of gpt2_e2e.py")
    add("--prompt_file", "--prompt-file", type=Path, help="more of them, one a line")
    add("--source", action="append", default=[], help="a sentence to translate; may be repeated")
    add("--num_tokens", type=int, default=100, help="most new tokens of each")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    add("--top_k", type=int, default=0, help="draw among that many tokens; 0: all")
    add("--seed", type=int, default=0, help="of the draws")
    add("--beam_size", type=int, default=0, help="search, not draw; translation always does, by 4")
    add("--length_penalty", type=float, help="of the search; 1, for translation 0.6")
    add("--no_repeat_ngram", type=int, default=0, help="of the search: no n tokens twice")
    add("--tokenizer", default="", help="gpt2 or bytes, for a folder without one")
    add("--data_dir", default="", help="where TFDS keeps its data, for a workdir")
    args = parse_args(options, argv)
    with told():
        print(run(args))


if __name__ == "__main__":
    main()

"""Tokenizers: GPT-2's, plain bytes, and byte-pair encodings, learned or of a checkpoint."""

from collections.abc import Iterable, Sequence
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import tiktoken
import tokenizers

from bdia_jax import interop
from train.config import Config

PAD, BOS, EOS = 0, 1, 2
SMALLEST_BPE = 3 + 256  # special ids and bytes

_GPT2_FILES = [
    f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
    for name in ("vocab.bpe", "encoder.json")
]


class Tokenizer(Protocol):
    """Text to ids and back: `decode(encode(text)) == text` for every text.

    Attributes:
        vocab_size: ids are below it.
        end_of_text: the id between documents. No text encodes to it, or to another special id,
            but those that are put around every text.
    """

    vocab_size: int
    end_of_text: int

    def encode(self, text: str, *, begins: bool = True, special: bool = False) -> list[int]:
        """The text's ids.

        Args:
            text: any.
            begins: with what the tokenizer of a checkpoint puts around a text, such as BOS.
                False: it goes on with another.
            special: a special token that is written in the text is that token, as in a prompt to
                transformers. Only for texts of people who may do so.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Special ids are left out; bytes that are not UTF-8 become U+FFFD."""
        ...


class Gpt2:
    """GPT-2's 50,257 tokens, by tiktoken.

    Raises:
        FileNotFoundError: neither the two files nor a network; the message says what to put where.
    """

    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network; a page instead of the file
            # tiktoken names its copies by the sha1 of their addresses
            files = "\n".join(
                f"    {url}  as  {sha1(url.encode()).hexdigest()}" for url in _GPT2_FILES
            )
            raise FileNotFoundError(
                "the GPT-2 tokenizer's files are neither here nor on the network. Download\n"
                f"{files}\n"
                "into a folder of their own, and set the environment variable TIKTOKEN_CACHE_DIR "
                f"to it.\ntiktoken said: {error}"
            ) from error

    def encode(self, text: str, *, begins: bool = True, special: bool = False) -> list[int]:
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if i != self.end_of_text])


class Bytes:
    """The bytes of UTF-8, and 256 as the end of text: no files, no training."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str, *, begins: bool = True, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i != self.end_of_text).decode(errors="replace")


class Bpe:
    """A byte-level byte-pair encoding; ids 0, 1, 2 are PAD, BOS and EOS if `train` made it.

    Its alphabet has all 256 bytes, so no text is unknown to it.

    Args:
        tokenizer: of the `tokenizers` package.
        end_of_text: the id between documents.

    Example:
        >>> bpe = Bpe.train(["le chat", "le chien", "the cat"], vocab_size=300)
        >>> bpe.decode([BOS, *bpe.encode("là-bas"), EOS, PAD])
        'là-bas'
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_of_text: int = EOS):
        self.end_of_text = end_of_text
        self._tokenizer = tokenizer
        # settings of whoever saved it, for batches of his; transformers undoes them, too
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)  # may have gaps

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Bpe":
        """The encoding of at most vocab_size tokens that these texts give, in any order.

        Args:
            texts: the training split, all languages together; read once.
            vocab_size: bytes and special ids included; few texts may give less.

        Raises:
            ValueError: a vocab_size below 259.
        """
        if vocab_size < SMALLEST_BPE:
            raise ValueError(
                f"vocab_size is {vocab_size}, expected at least {SMALLEST_BPE}: "
                "3 special ids and 256 bytes"
            )
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = byte_level
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path, end_of_text: int = EOS) -> "Bpe":
        """What `save` wrote, or the tokenizer.json of a Hugging Face folder.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such JSON.
        """
        content = Path(path).read_bytes()
        try:
            return cls(tokenizers.Tokenizer.from_str(content.decode()), end_of_text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the package is no Exception
            raise ValueError(f"{path} is not a file of the package tokenizers: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes JSON, in the format of the `tokenizers` package."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), "utf-8")

    def encode(self, text: str, *, begins: bool = True, special: bool = False) -> list[int]:
        # or a text with "<eos>" in it would get the id 2
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=begins).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def open_tokenizer(
    name: str, folder: str | Path = "", texts: Iterable[str] = (), vocab_size: int = 0
) -> Tokenizer:
    """The tokenizer a config names.

    Args:
        name: "gpt2"; "bytes"; "bpe", learned from texts; or "checkpoint", that of folder.
        folder: a Hugging Face folder with config.json and tokenizer.json.
        texts, vocab_size: as in `Bpe.train`.

    Raises:
        FileNotFoundError: a file of the tokenizer is not there.
        ValueError: an unknown name; "checkpoint" without a folder; as `Bpe.train`.
    """
    if name == "bpe":
        return Bpe.train(texts, vocab_size)
    if name == "checkpoint":
        return _of_checkpoint(folder)
    simple: dict[str, type[Tokenizer]] = {"gpt2": Gpt2, "bytes": Bytes}
    if name not in simple:
        raise ValueError(
            f"input.tokenizer is {name!r}, expected one of {(*simple, 'bpe', 'checkpoint')}"
        )
    return simple[name]()


def largest_tokenizer(config: Config) -> Any:
    """In place of the tokenizer of a config, whose files or texts are not read: its sizes at most.

    Raises:
        FileNotFoundError, ValueError: as `interop.read_architecture`.
    """
    name = config.input.tokenizer_name
    if name == "checkpoint":
        size = interop.read_architecture(config.init_from).arguments["vocab_size"]
    else:
        size = {"gpt2": Gpt2, "bytes": Bytes}.get(name, config.input).vocab_size
    return SimpleNamespace(vocab_size=size, end_of_text=0)


def _of_checkpoint(folder: str | Path) -> Bpe:
    path = Path(folder)
    if not folder or not (path / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"input.tokenizer is 'checkpoint', but init_from {str(folder)!r} has no "
            "tokenizer.json; put it there, or take input.tokenizer 'gpt2' for a GPT-2"
        )
    # the first, where a text may end in several ways
    ends = interop.read_tokens(path / "config.json", "eos_token_id") + interop.read_end_tokens(path)
    if not ends:
        raise ValueError(
            f"{path / 'config.json'} has no eos_token_id; write the id there that ends a text"
        )
    return Bpe.load(path / "tokenizer.json", ends[0])

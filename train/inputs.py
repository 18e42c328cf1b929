"""What a config says of the data: `config.input`, one class for each task."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """Augmentation: RandAugment (0 operations for none), crop out of a padded image, flip.

    inference_gammas: constant gammas the trained model is evaluated with at the end (Fig. 1).
    """

    rand_augment_ops: int
    rand_augment_magnitude: int
    crop_padding: int
    flip: bool
    inference_gammas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TextInput:
    """tokenizer: "gpt2", "bytes", "bpe" (learned from the training split, of at most vocab_size
    tokens) or "checkpoint" (that of `config.init_from`); length: tokens a sequence is packed to.

    isolate_documents: positions start at 0 in every document, and a token sees its own document
    only. This takes a mask, and with one attention is not cuDNN's (`choose_implementation` in
    `bdia_jax.models.attention`): it writes weights [B, H, T, T]. False: positions run on, and a
    token sees all before it in the window, as GPT-2 and nanoGPT are trained; no mask, so flash
    attention where the device has it.
    """

    tokenizer: str
    vocab_size: int
    length: int
    isolate_documents: bool


@dataclasses.dataclass(frozen=True)
class PairInput:
    """vocab_size of the BPE trained on both languages; boundaries: the buckets' lengths.

    beam_size and eval_translations: how, and how many sentences, the BLEU score is made of.
    """

    vocab_size: int
    boundaries: tuple[int, ...]
    beam_size: int
    eval_translations: int


@dataclasses.dataclass(frozen=True)
class DataToTextInput:
    """tokenizer as in `TextInput`, but for "bpe"; length: tokens the model sees, padding included.

    label_smoothing: share of the training target spread evenly over the vocabulary; the evaluation
    loss is without it. beam_size, length_penalty, no_repeat_ngram (0: none): how the meanings are
    decoded at the end; eval_generations: how many of them at most, 0 for none.
    """

    tokenizer: str
    length: int
    label_smoothing: float
    beam_size: int
    length_penalty: float
    no_repeat_ngram: int
    eval_generations: int

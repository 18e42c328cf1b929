"""What surrounds the weights, against transformers: prompts, ends of texts, chats, what is written.

Folders are made by transformers itself, with small random models and tokenizers.
"""

import json
from functools import cache

import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bdia_jax import interop
from train import generate
from train.data import text
from train.data.tokens import open_tokenizer
from train.tasks.data_to_text import encode_sentences

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]

SENTENCES = ["Once upon a time, there was a fox.", "The fox said: hello!", "Où est-il ? Là-bas 😀."]
PROMPTS = ["Once upon", " The fox", "", "a\n\nb  c", "日本 é", "<|end|> fox <|start|>hello<|turn|>"]
SPECIAL = ["<|start|>", "<|end|>", "<|turn|>"]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SIZES = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 400, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
KINDS = {  # configuration and tokenizer
    "gpt2": ("GPT2Config", GPT2, "bytes"),
    "llama": ("LlamaConfig", SIZES, "bytes, start"),
    "mistral": ("MistralConfig", SIZES, "spaces, start"),
    "qwen2": ("Qwen2Config", SIZES, "bytes, cut"),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 6}, "spaces, start, end"),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def make_tokenizer(kind):
    """As GPT-2 has it, or Llama 2: "spaces"; with what is put around a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback="spaces" in kind))
    if "spaces" in kind:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        alphabet, more = [], [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, more = pre_tokenizers.ByteLevel.alphabet(), []
    options = {"initial_alphabet": alphabet, "show_progress": False, "vocab_size": 380}
    tokenizer.train_from_iterator(
        SENTENCES * 3, trainers.BpeTrainer(special_tokens=SPECIAL + more, **options)
    )
    if "start" in kind:
        last = " <|end|>" if "end" in kind else ""
        ids = [("<|start|>", 0), ("<|end|>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"<|start|> $A{last}", special_tokens=ids
        )
    if "cut" in kind:  # as it was trained or embedded with
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=9)
    return tokenizer


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """kind -> (their model, their tokenizer, the folder that they saved)."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))

    @cache
    def make(kind):
        config_class, sizes, tokenizer_kind = KINDS[kind]
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**sizes, eos_token_id=1, initializer_range=0.6)
        folder = tmp_path_factory.mktemp("theirs") / kind
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(tokenizer_kind),
            bos_token="<|start|>",
            eos_token="<|end|>",
            chat_template=CHAT,
        )
        wrapped.save_pretrained(folder)
        if "cut" in tokenizer_kind:  # which they do not save
            make_tokenizer(tokenizer_kind).save(str(folder / "tokenizer.json"))
        return *opened_there(folder), folder

    return make


def opened_there(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@EVERY
def test_prompts_are_encoded_as_there(theirs, kind):
    _, tokenizer, folder = theirs(kind)
    ours = open_tokenizer("checkpoint", folder)
    seen = {}
    for prompt in PROMPTS + SENTENCES:
        expected = tokenizer(prompt).input_ids
        assert ours.encode(prompt, special=True) == expected
        seen[prompt] = expected
        without = tokenizer(prompt, add_special_tokens=False).input_ids
        assert ours.encode(prompt, begins=False, special=True) == without
        assert ours.decode(expected) == tokenizer.decode(expected, skip_special_tokens=True)
        if "<|" not in prompt:
            assert ours.encode(prompt) == expected
    assert len(seen[SENTENCES[0]]) > 3
    # a text that is not trusted has no special tokens of its own
    assert not {1, 2} & set(ours.encode(PROMPTS[-1], begins=False))
    assert {1, 2} <= set(seen[PROMPTS[-1]])


def test_what_is_put_around_a_text_is_not_put_into_one(theirs, monkeypatch):
    """Packed documents have one end before each, and a sentence goes on with its meaning."""
    _, _, folder = theirs("qwen3")  # whose tokenizer puts the end behind, too
    ours, end, start = open_tokenizer("checkpoint", folder), 1, 0
    monkeypatch.setattr(text, "read_texts", lambda *_: ((line,) for line in SENTENCES))
    packed = text.load_text("a set", "train", "", ours, 8)
    expected = [
        token for line in SENTENCES for token in (end, start, *ours.encode(line, begins=False))
    ]
    assert packed[:, 1:].ravel().tolist() == expected[1 : packed[:, 1:].size + 1]
    sentences, _ = encode_sentences([("a fox", "It is.")], ours, 60)
    assert (sentences.tokens[0] == start).sum() == 1 and ours.end_of_text == end


def written(capsys, folder, prompt, *options):
    generate.main(["--from", str(folder), "--prompt", prompt, "--temperature=0", *options])
    return capsys.readouterr().out.removesuffix("\n")


def expected_text(theirs, prompt, **options):
    """(what they print, how many tokens are new)."""
    model, tokenizer, _ = theirs
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0, **options)[0]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids) - inputs.input_ids.shape[1]


@EVERY
@pytest.mark.claim("text ends where transformers ends it")
@pytest.mark.control("text ends where transformers ends it")
def test_texts_that_are_generated_are_equal_and_end_where_theirs_do(
    theirs, kind, capsys, tmp_path, monkeypatch
):
    model, tokenizer, folder = theirs(kind)
    interop.save(interop.load(folder, rngs=nnx.Rngs(0)), tmp_path / "ends", source=folder)
    prompt = "Once upon a fox"
    new = model.generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(tokenizer(prompt).input_ids) :].tolist()
    # a token that comes late, for the first time; 399 and 398 come never
    place, end = max((new.index(token), token) for token in set(new) if new.index(token) < 20)
    never = [token for token in (399, 398) if token not in new]
    lengths = []
    variants = [
        (never[0], [never[0], end]),  # as Llama 3 Instruct was published
        ([end], never[0]),
        ([never[0], end], None),
        (end, "none"),
    ]
    for config, generation in variants if kind == "llama" else variants[:2]:
        there = tmp_path / "ends"
        described = json.loads((there / "config.json").read_text()) | {"eos_token_id": config}
        (there / "config.json").write_text(json.dumps(described))
        file = there / "generation_config.json"
        file.unlink(missing_ok=True)
        if generation is not None:
            asked = {} if generation == "none" else {"eos_token_id": generation}
            file.write_text(json.dumps(asked))
        said, length = expected_text((*opened_there(there), there), prompt)
        # an end that is an ordinary token: they print it, here it is left out
        if length == place + 1:
            ids = tokenizer(prompt).input_ids + new[:place]
            said = tokenizer.decode(ids, skip_special_tokens=True)
        assert written(capsys, there, prompt, "--num_tokens=24") == said
        lengths.append(length)
    assert lengths == [place + 1, 24, place + 1, 24][: len(lengths)]
    # control: the first end alone, as of config.json
    monkeypatch.setattr(interop, "read_end_tokens", lambda _: (never[0],))
    on = written(capsys, there, prompt, "--num_tokens=24")
    assert on != tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_several_prompts_are_continued_as_each_alone(theirs, kind, capsys):
    _, _, folder = theirs(kind)
    prompts = PROMPTS[:2] + SENTENCES[:1]
    alone = [written(capsys, folder, prompt, "--num_tokens=9") for prompt in prompts]
    more = [f"--prompt={prompt}" for prompt in prompts[1:]]
    together = written(capsys, folder, prompts[0], *more, "--num_tokens=9")
    assert together == "\n==========\n".join(alone)


@EVERY
def test_what_is_written_is_opened_there_as_before(theirs, kind, tmp_path):
    import transformers

    _, tokenizer, folder = theirs(kind)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation |= {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True, "top_p": 0.9}
    source = tmp_path / "source"
    interop.save(interop.load(folder, rngs=nnx.Rngs(0)), source, source=folder)
    (source / "generation_config.json").write_text(json.dumps(generation))
    new = tmp_path / "new"
    interop.save(interop.load(source, rngs=nnx.Rngs(0)), new, source=source)
    model, again = opened_there(new)
    for name in ("eos_token_id", "temperature", "do_sample", "top_p"):
        assert getattr(model.generation_config, name) == generation[name]
    messages = [{"role": "user", "content": "Where is the fox?"}]
    chat = {"tokenize": False, "add_generation_prompt": True}
    said = tokenizer.apply_chat_template(messages, **chat)
    assert again.apply_chat_template(messages, **chat) == said
    assert again.chat_template == CHAT and "Where is the fox?<|turn|><|start|>assistant" in said
    assert again(said).input_ids == tokenizer(said).input_ids
    assert open_tokenizer("checkpoint", new).encode(said, special=True) == again(said).input_ids
    config = transformers.AutoConfig.from_pretrained(new)
    assert config.to_dict()["eos_token_id"] == 1 and np.ndim(config.bos_token_id) == 0

"""Hugging Face folders that are damaged, or of another model: what is said, and what is left."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from toy import assert_same_bits
from toy_models import small

from bdia_jax import interop, lora
from bdia_jax.baselines import MidpointStack
from bdia_jax.interop import beside
from bdia_jax.interop.layout import Entry
from bdia_jax.models.gpt2 import GPT2

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES = {"vocab_size": 11, "max_len": 6, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12}
NAME = "transformer.h.1.mlp.c_fc.weight"


def abstract(**options):
    return nnx.eval_shape(lambda: GPT2(**(SIZES | options), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return small("gpt2", **SIZES)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    interop.save(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "gpt2")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, message, error=ValueError, like=None, **options):
    with pytest.raises(error, match=message):
        interop.read_params(folder, abstract() if like is None else like, **options)


# --- tensors -------------------------------------------------------------------------


def test_a_folder_is_what_was_saved(model, folder):
    assert left_in(folder.parent) == ["gpt2"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    again = interop.load(folder, rngs=nnx.Rngs(0))
    # what is no parameter is as if the model had been made
    made = GPT2(**SIZES, rngs=nnx.Rngs(0))
    for kind, other in ((nnx.Param, model), (nnx.Not(nnx.Param), made)):
        states = (nnx.to_flat_state(nnx.state(m, kind)) for m in (again, other))
        for (path, a), (other_path, b) in zip(*states, strict=True):
            assert path == other_path and a.dtype == b.dtype
            assert jnp.array_equal(a[...], b[...])


def test_shards_hold_no_more_than_asked_and_are_read(model, tmp_path):
    interop.save(model, tmp_path / "sharded", max_shard_bytes=1000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    sizes = {
        file: [value.nbytes for value in load_file(tmp_path / "sharded" / file).values()]
        for file in set(index["weight_map"].values())
    }
    assert len(sizes) > 3 and all(sum(s) <= 1000 or len(s) == 1 for s in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    params = interop.read_params(tmp_path / "sharded", abstract())
    assert_same_bits(params["embedding"][...], model.embedding[...])
    first = tmp_path / "sharded" / index["weight_map"]["transformer.wte.weight"]
    first.unlink()
    refused(tmp_path / "sharded", f"{first.name} is not there", FileNotFoundError)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_floats_of_any_width_become_float32(folder, model, dtype):
    change_tensors(folder, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    kernel = interop.read_params(folder, abstract())["stack"]["blocks"]["mlp"]["hidden"]["kernel"]
    expected = np.asarray(model.stack.blocks.mlp.hidden.kernel[...]).astype(dtype)
    assert_same_bits(kernel[...], jnp.asarray(expected.astype(np.float32)))


def test_old_files_hold_masks_and_the_tied_projection_too(folder, model):
    def as_old(tensors):
        for k in range(2):
            tensors[f"transformer.h.{k}.attn.bias"] = np.ones((1, 1, 6, 6), bool)
            tensors[f"transformer.h.{k}.attn.masked_bias"] = np.float32(-1e4)[None]
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    change_tensors(folder, as_old)
    params = interop.read_params(folder, abstract())
    assert_same_bits(params["embedding"][...], model.embedding[...])
    change_tensors(folder, lambda t: t.pop("transformer.wte.weight"))  # the other is the same
    params = interop.read_params(folder, abstract())
    assert_same_bits(params["embedding"][...], model.embedding[...])
    change_tensors(folder, adding("wte.weight", lambda t: t["lm_head.weight"] + 1))
    refused(folder, r"lm_head.weight in .* is not equal to transformer.wte.weight.*untied")


def setting(at, value):
    return lambda tensors: tensors[NAME].__setitem__(at, value)


def adding(name, make):
    return lambda tensors: tensors.update({name: make(tensors)})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NAME), rf"{NAME} is missing in .*gpt2.*take a complete"),
        (
            adding("h.2.ln_1.bias", lambda t: t["transformer.ln_f.bias"]),
            r"h.2.ln_1.bias in .*model.safetensors is no tensor of this model",
        ),
        (
            adding("lm_head.bias", lambda _: np.zeros(11, np.float32)),
            r"lm_head.bias in .* is no tensor",
        ),
        (
            setting((3, 2), np.nan),
            rf"{NAME} in .*model.safetensors has 1 elements that are NaN .*\[3, 2\]",
        ),
        (setting((0, 1), -np.inf), rf"{NAME} in .* infinite"),
        (adding(NAME, lambda t: t[NAME].astype(np.int8)), rf"{NAME} in .* dtype I8.*converted"),
        (adding("wte.weight", lambda t: t["transformer.wte.weight"]), "is there as .* too"),
        (
            adding(NAME, lambda t: t[NAME].T.copy()),
            rf"{NAME} in .* has shape \[12, 8\], but \[8, 12\] .*stack.blocks.mlp.hidden.kernel",
        ),
    ],
    ids=["missing", "a block more", "unexpected", "nan", "inf", "int8", "twice", "transposed"],
)
def test_a_wrong_tensor_is_named_with_its_file(folder, change, message):
    change_tensors(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 12}, r"wte.weight in .* \[11, 8\], but \[12, 8\].*embedding"),
        ({"depth": 3}, r"h.2.ln_1.weight is missing"),
        ({"depth": 1}, r"h.1.\S+ in .* is no tensor"),
    ],
)
def test_another_model_is_named_by_the_first_tensor_that_differs(saved, options, message):
    refused(saved, message, like=abstract(**options))


def test_a_model_without_a_format_is_named(saved):
    like = nnx.eval_shape(lambda: nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    refused(saved, r"LayerNorm has no Hugging Face format.*GPT2.*ViT", like=like)


def test_what_is_kept_is_not_read(folder):
    longer = abstract(max_len=7)
    refused(folder, r"wpe.weight.*keep=\('positions',\)", like=longer)
    params = interop.read_params(folder, longer, keep=("positions",))
    assert "positions" not in params and "embedding" in params
    change_tensors(folder, setting((0, 0), np.nan))
    params = interop.read_params(folder, abstract(), keep=("stack.blocks.mlp",))
    assert "mlp" not in params["stack"]["blocks"]
    refused(folder, r"keep has 'stack.block', where the model has no", keep=("stack.block",))


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder, left):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:left])
    refused(folder, r"model.safetensors is truncated or no safetensors file .*copy it again")


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [4, 36]},  # of the one before, too
        {"data_offsets": [-4, 0]},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"shape": [7]},
        {"dtype": "F64"},
        {"dtype": "x" * 9999},
        {"dtype": None},
        "name\nof two lines",
        "x" * 9999,
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_damaged_header_is_named_in_one_line(folder, change):
    file, name = folder / "model.safetensors", "transformer.ln_f.weight"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if isinstance(change, str):
        header[change] = header.pop(name)
    else:
        header[name] |= change
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors (is truncated or|has a tensor)") as e:
        interop.read_params(folder, abstract())
    assert str(e.value).endswith("copy it again") and len(str(e.value)) < 500
    assert "\n" not in str(e.value)


def test_an_index_that_is_wrong_is_named(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    refused(folder, r"neither model.safetensors nor .*safe_serialization", FileNotFoundError)
    index = folder / "model.safetensors.index.json"
    for weight_map, message in (
        (None, 'has no "weight_map"'),
        ({NAME: "../part.safetensors"}, 'has no "weight_map"'),
        ({NAME: ".."}, 'has no "weight_map"'),
        ({NAME: ""}, 'has no "weight_map"'),
        ({"a\nb": "part.safetensors"}, r"index.json has a tensor named 'a\\nb'"),
        ({NAME: "part.safetensors", "x": "part.safetensors"}, r"x is not in .*part.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, message)


# --- config.json ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json is not there"),
        ("{", "config.json is not JSON"),
        ("[1]", "config.json holds a list"),
        ("[" * 10**5, "config.json is not JSON .*copy it again"),
        ("{}", "config.json: no field model_type, expected .*'gpt2'.*'vit'"),
        ('{"model_type": "bert"}', "model_type is 'bert', expected .*nothing else is implemented"),
        ('{"model_type": ["gpt2"]}', r"model_type is \['gpt2'\], expected"),
        ('{"model_type": "gpt2"}', "config.json: no field vocab_size, expected a whole number"),
    ],
)
def test_a_config_that_is_none_is_named(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=message):
        interop.load(folder, rngs=nnx.Rngs(0))


def test_sizes_that_are_enormous_together_are_refused(folder):
    change_config(folder, vocab_size=2**31 - 1, n_embd=2**31 - 2, n_positions=2**31 - 1)
    with pytest.raises(
        ValueError, match=r"wte.weight in .* \[11, 8\], but \[2147483647, 2147483646"
    ):
        interop.load(folder, rngs=nnx.Rngs(0))


def test_more_blocks_than_the_files_hold_are_refused_from_their_headers(folder):
    change_config(folder, n_layer=2**31 - 1)
    with pytest.raises(ValueError, match=r"h\.2\.ln_1.* is missing .* 2147483647 blocks.*n_layer"):
        interop.load(folder, rngs=nnx.Rngs(0))


# --- saving --------------------------------------------------------------------------


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_something_in_it_is_not_touched(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="full exists and is not empty; choose another"):
        interop.save(model, tmp_path / "full")
    assert (tmp_path / "full" / "config.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    interop.save(model, tmp_path / "empty")
    assert left_in(tmp_path) == ["empty", "full"]


def with_nan(model):
    bias = model.stack.blocks.mlp.out.bias
    bias[...] = bias[...].at[1, 2].set(jnp.nan)


def with_adapter(model):
    lora.add(model, ("mlp.hidden",), rank=1, alpha=1.0, rngs=nnx.Rngs(0))


def with_gamma(model):
    model.stack.inference_gamma = 0.2


def with_activation(model):
    model.stack.blocks.mlp.activation = jnp.sin


@pytest.mark.parametrize(
    "name, options, change, message",
    [
        ("gpt2", {}, with_nan, r"h.1.mlp.c_proj.bias in the model has 1 .* are NaN .*\[2\]"),
        ("gpt2", {}, with_adapter, r"mlp.hidden.lora_a.*merge adapters first"),
        ("gpt2", {}, with_gamma, r"stack.inference_gamma is 0.2.*set it to 0"),
        ("gpt2", {}, None, r"source/config.json is not there"),
        ("vit", {"stack": MidpointStack}, None, "MidpointStack, another network"),
        ("linformer", {}, None, "project_keys.*take the standard attention"),
        ("vit", {"locality_attention": True}, None, "log_temperature.*take the standard attention"),
        ("vit", {"shifted_patches": True}, None, r"patches\.linear\.kernel.*not of both"),
        ("vit", {}, with_activation, "activation is .*config.json has no name for"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_left(
    tmp_path, name, options, change, message
):
    model = small(name, **options)
    source = tmp_path / "source" if message.startswith("source") else None
    if change is not None:
        change(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        interop.save(model, tmp_path / "new", source=source, max_shard_bytes=500)
    assert left_in(tmp_path) == []


KEPT = [
    *("LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "merges.txt"),
    *("my_rules.yaml", "preprocessor_config.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json"),
]
LEFT = [
    *("pytorch_model.bin", "tf_model.h5", "model.GGUF", "training_args.bin", "optimizer.pt"),
    *("pytorch_model.bin.index.json", "model-00001-of-00002.safetensors", "adapter_config.json"),
    *("modeling_mine.py", "kernel.so", ".gitattributes"),
]


def test_the_source_hands_on_all_but_weights_and_code(model, folder, tmp_path):
    changes = {"eos_token_id": [7, 8], "note": "mine", "torch_dtype": "bfloat16", "n_embd": 99}
    code = {"auto_map": {"AutoConfig": "modeling_mine.Config"}, "quantization_config": {}}
    change_config(folder, **changes, **code)
    for name in KEPT + LEFT:
        (folder / name).write_text("{}" if name.endswith("json") else name)
    (folder / "tokenizer_config.json").write_text(json.dumps(code | {"eos_token": "auto_map"}))
    (folder / "vocab.json").write_text('{"auto_map": 3}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "onnx").mkdir()
    (folder / "link.txt").symlink_to(folder / "LICENSE")  # as the Hub's cache has them
    new = tmp_path / "new"
    interop.save(model, new, source=folder)
    written = ["additional_chat_templates", "config.json", "link.txt", "model.safetensors"]
    assert left_in(new) == sorted(KEPT + written)
    assert left_in(new / "additional_chat_templates") == ["tools.jinja"]
    assert not (new / "link.txt").is_symlink() and (new / "link.txt").read_text() == "LICENSE"
    for name in set(KEPT) - {"tokenizer_config.json"}:
        assert (new / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((new / "tokenizer_config.json").read_text()) == {"eos_token": "auto_map"}
    config = json.loads((new / "config.json").read_text())
    assert config["eos_token_id"] == [7, 8] and config["note"] == "mine"
    assert config["n_embd"] == 8 and config["dtype"] == "float32"
    assert not {"torch_dtype", *code} & config.keys()


def test_what_is_larger_than_a_description_stays(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "_MOST_BYTES", 5)
    (folder / "weights.new").write_text("123456")
    (folder / "note").write_text("12345")
    interop.save(model, tmp_path / "new", source=folder)
    assert left_in(tmp_path / "new") == ["config.json", "model.safetensors", "note"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": "7"}, "config.json: eos_token_id is '7', expected a whole number from 0"),
        ({"use_cache": "no"}, "config.json: use_cache is 'no', expected true or false"),
        ({"id2label": {"a": "b"}}, "config.json: id2label is .*, expected names of classes"),
    ],
)
def test_wrong_fields_are_not_handed_on(model, folder, tmp_path, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        interop.save(model, tmp_path / "new", source=folder)
    assert not (tmp_path / "new").exists()


def test_names_of_classes_stay_if_there_are_as_many(tmp_path):
    interop.save(small("vit", num_classes=3), tmp_path / "a")
    labels = {"0": "cat", "1": 7, "2": "eel"}  # transformers takes numbers, too
    change_config(tmp_path / "a", id2label=labels)
    for num_classes, expected in ((3, labels), (2, {"0": "LABEL_0", "1": "LABEL_1"})):
        target = tmp_path / str(num_classes)
        interop.save(small("vit", num_classes=num_classes), target, source=tmp_path / "a")
        config = json.loads((target / "config.json").read_text())
        assert config["id2label"] == expected
        assert config["label2id"] == {str(v): int(k) for k, v in expected.items()}


# --- the table -----------------------------------------------------------------------


def test_parameters_side_by_side_are_one_tensor(model, folder):
    entry = Entry(("blocks.q", "blocks.k"), "l.{}.qk")
    arrays = [np.arange(2 * 4 * n, dtype=np.float32).reshape(2, 4, n) for n in (3, 2)]
    shapes = entry.shapes({"blocks.q": arrays[0], "blocks.k": arrays[1]})
    assert shapes == {"l.0.qk": (4, 5), "l.1.qk": (4, 5)}
    for part, array in zip(dict(entry.views(arrays))["l.1.qk"], arrays, strict=True):
        np.testing.assert_array_equal(part, array[1])
        assert np.shares_memory(part, array)
    # in a file
    attention = model.stack.blocks.attention
    kernels = [linear.kernel[1] for linear in (attention.query, attention.key, attention.value)]
    written = load_file(folder / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(written, np.concatenate(kernels, axis=-1))
    # and without one of them
    kept = "stack.blocks.attention.key"
    read = interop.read_params(folder, abstract(), keep=(kept,))["stack"]["blocks"]["attention"]
    assert set(read) == {"query", "value", "out"}
    assert_same_bits(read["value"]["kernel"][...], attention.value.kernel[...])

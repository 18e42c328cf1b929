"""How a Hugging Face folder says that text is to be generated: by which tokens it ends."""

from pathlib import Path

from bdia_jax.interop.fields import TOKENS, read_fields, told_of
from bdia_jax.interop.files import CONFIG, read_json

GENERATION = "generation_config.json"


def read_end_tokens(folder: str | Path) -> tuple[int, ...]:
    """The ids that end a text, as transformers' `generate` takes them; () if none does.

    They are the eos_token_id of generation_config.json, or of config.json if there is no such
    file. Temperature, penalties and whatever else is in it is not read.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file that is not JSON, or an eos_token_id that is neither an id nor several.

    Example:
        end = interop.read_end_tokens("llama")
        text = generate(model, prompt, 100, end_token=end, temperature=0)
    """
    path = Path(folder) / GENERATION
    if not path.is_file():
        path = Path(folder) / CONFIG
    return read_tokens(path, "eos_token_id")


def read_tokens(path: Path, name: str) -> tuple[int, ...]:
    """The ids that a field of a JSON file has: one, several or none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or the field is neither an id nor several.
    """
    config = read_json(path)
    with told_of(path):
        value = read_fields(config, {name: TOKENS})[name]
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)

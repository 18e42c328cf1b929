"""What is learnt: one file a task, and a line for it in `TASKS`.

A file has the class of `config.input`, a function that reads the examples, one that tells their
shapes, and a `TaskKind` of these. `open_config`, `load_task` and `abstract_task` are the doors.
"""

from typing import Any

from bdia_jax import interop
from train.config import Config, LoRAConfig, MeshConfig, PretrainedConfig
from train.data.tokens import Tokenizer
from train.fields import short
from train.tasks import data_to_text, images, language, translation
from train.tasks.task import Task, TaskKind, group_size

__all__ = ["TASKS", "abstract_task", "load_task", "open_config"]

TASKS: dict[str, TaskKind] = {
    "images": images.KIND,
    "language": language.KIND,
    "translation": translation.KIND,
    "data_to_text": data_to_text.KIND,
}


def open_config(config: Any) -> Config:
    """The frozen form of the ml_collections.ConfigDict that a file in configs/ returns.

    With init_from the model is that of the checkpoint, whatever architecture the config has. A
    gamma of -1 is then `interop.CHECKPOINT_GAMMA`, and without init_from the paper's 1/2.

    Raises:
        ValueError: fields that are missing, unknown, of a wrong type or range, or at odds.
    """
    values = {str(name): value for name, value in config.to_dict().items()}
    for name in ("input", "model", "lora", "mesh"):
        if not isinstance(values.get(name), dict):
            raise ValueError(f"{name} is {short(values.get(name))}, expected a group of fields")
        values[name] = {str(field): value for field, value in values[name].items()}
    kind = _choice("task", values.get("task"), TASKS)
    model = values["model"]
    model_class = _choice("model.name", model.get("name"), kind.models)
    if values.get("init_from"):
        if not model_class.is_standard:
            raise ValueError(
                f"init_from={short(values['init_from'])} with model {model['name']!r}: only a ViT "
                "and a language model start from a checkpoint; set init_from=''"
            )
        kept = {field: model[field] for field in ("dropout_rate", "dtype") if field in model}
        model_class, model = PretrainedConfig, {"name": "pretrained", **kept}
    if values.get("gamma") == -1:
        values["gamma"] = interop.CHECKPOINT_GAMMA if values.get("init_from") else 0.5
    values["model"] = model_class(**model)
    values["input"] = kind.input(**values["input"])
    values["lora"] = LoRAConfig(**values["lora"])
    values["mesh"] = MeshConfig(**values["mesh"])
    return Config(**values)


def _choice(name: str, value: Any, choices: Any) -> Any:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} is {short(value)}, expected one of {(*choices,)}")
    return choices[value]


def load_task(config: Config) -> Task:
    """Reads the data of a config and says what is to be learnt from it.

    Raises:
        FileNotFoundError: the data set is not prepared.
        ValueError: it does not fit the config.
    """
    task = TASKS[config.task].load(config)
    count = sum(map(group_size, task.train_groups))
    if config.batch_size > count:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {count} examples")
    return task


def abstract_task(config: Config, tokenizer: Tokenizer | None = None) -> Task:
    """What `load_task` makes, but for its examples: one batch of `jax.ShapeDtypeStruct`s.

    Args:
        config: the run's.
        tokenizer: of a trained run; by default the one with the largest vocabulary there can be.

    Raises:
        FileNotFoundError, ValueError: images whose data set is not prepared: it alone knows their
            shape and classes; a checkpoint that does not fit.
    """
    return TASKS[config.task].abstract(config, tokenizer)

"""Image classification: small image sets, kept on the device as uint8, augmented there."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bdia_jax import interop
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.resnet import ResNet
from bdia_jax.models.vit import ViT
from train.config import Config
from train.data.augment import augment
from train.datasets.registry import in_chunks, open_split
from train.devices.mesh import open_mesh
from train.devices.shards import local_rows
from train.inputs import ImageInput
from train.loop.evaluation import group_totals
from train.model_config import ResNetConfig
from train.tasks.task import Metrics, Task


class Images(NamedTuple):
    """images: uint8 [N, height, width, channels]; labels: int32 [N]."""

    images: Any
    labels: Any


def load(config: Config) -> Task:
    """The task of a config whose input is an `ImageInput`.

    Of the training images a process reads its share.
    """
    where = (config.dataset, config.train_split, config.data_dir)
    count = len(open_split(*where)[0])
    train, num_classes = load_images(*where, local_rows(count, open_mesh(config.mesh)).tolist())
    held_out, _ = load_images(config.dataset, config.eval_split, config.data_dir)
    return make_task(config, train, held_out, num_classes)._replace(
        train_counts=(count,), describe=f"{count:,} images of {config.dataset}"
    )


def make_task(config: Config, train: Images, held_out: Images, num_classes: int) -> Task:
    """The task of telling `num_classes` classes of these images apart."""
    assert isinstance(config.input, ImageInput)
    options = config.input

    def prepare(key: jax.Array, batch: Images) -> Images:
        images = augment(
            key,
            batch.images,
            rand_augment_ops=options.rand_augment_ops,
            rand_augment_magnitude=options.rand_augment_magnitude,
            crop_padding=options.crop_padding,
            flip=options.flip,
        )
        return batch._replace(images=images)

    def finish(models: list[Any], workdir: Path) -> dict[str, list[float]]:
        """Accuracy with each constant gamma at inference (Fig. 1), if others than 0 are asked."""
        del workdir
        gammas = options.inference_gammas
        if gammas in ((), (0.0,)):
            return {}
        return {
            f"accuracy_gamma_{gamma}": [
                _accuracy(model, gamma, held_out, config.batch_size) for model in models
            ]
            for gamma in gammas
        }

    return Task(
        (train,),
        (held_out,),
        partial(_make_model, config, train.images.shape[1:], num_classes),
        prepare,
        _metrics,
        f"{len(train.images):,} images of {config.dataset}",
        finish,
    )


def load_images(
    name: str, split: str, data_dir: str = "", rows: Sequence[int] | None = None
) -> tuple[Images, int]:
    """A split of an image classification set, and its number of classes.

    Args:
        name: a data set with features "image" (all of one shape) and "label".
        split: a TFDS split, slices such as "train[:90%]" included.
        data_dir: where TFDS keeps its data; "" for its default.
        rows: which examples; all by default, others are not read.

    Raises:
        FileNotFoundError, ValueError: as `train.datasets.registry.open_split`.
    """
    source, builder = open_split(name, split, data_dir, "image", "label")
    examples = [(example["image"], example["label"]) for example in in_chunks(source, rows=rows)]
    images = np.stack([image for image, _ in examples])
    labels = np.asarray([label for _, label in examples], np.int32)
    num_classes = builder.info.features["label"].num_classes
    return Images(images, labels), num_classes


def normalize(images: jax.Array) -> jax.Array:
    """uint8 0..255 to float32 -1..1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def _make_model(config: Config, image_shape, num_classes: int, rngs: nnx.Rngs) -> nnx.Module:
    arguments: dict[str, Any] = config.model_arguments
    if config.init_from:
        return _of_checkpoint(config.init_from, image_shape, num_classes, arguments, rngs)
    if isinstance(config.model, ResNetConfig):
        return ResNet(image_shape, num_classes, **arguments, rngs=rngs)
    linformer_dim = arguments.pop("linformer_dim")
    if linformer_dim:
        tokens = image_shape[0] * image_shape[1] // arguments["patch_size"] ** 2 + 1
        if linformer_dim >= tokens:
            raise ValueError(
                f"model.linformer_dim is {linformer_dim} for {tokens} tokens, which saves nothing; "
                "take a smaller one, or 0 for ordinary attention"
            )
        arguments["attention"] = partial(
            LinformerAttention, num_tokens=tokens, projected=linformer_dim
        )
    return ViT(image_shape, num_classes, **arguments, rngs=rngs)


def _of_checkpoint(folder: str, image_shape, num_classes: int, arguments, rngs) -> nnx.Module:
    """A ViT of a checkpoint's architecture; it sees the images in its own size."""
    model, its = interop.read_architecture(folder)
    if model is not ViT:
        raise ValueError(f"init_from {folder} is a {model.__name__}, which sees no images")
    if its["image_shape"][-1] != image_shape[-1]:
        raise ValueError(
            f"init_from {folder} takes images of shape {its['image_shape']}, the data set has "
            f"{image_shape}: other channels; take another checkpoint or data set"
        )
    return ViT(**its | arguments | {"num_classes": num_classes}, rngs=rngs)


def _metrics(model: Any, batch: Images, rngs: nnx.Rngs | None) -> Metrics:
    images = normalize(batch.images)
    shape = (len(images), *getattr(model, "image_shape", images.shape[1:]))
    if images.shape != shape:  # of a checkpoint for larger images
        images = jax.image.resize(images, shape, "bilinear")
    logits = model(images, rngs=rngs)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    correct = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
    return {"loss": (loss, jnp.ones_like(loss)), "accuracy": (correct, jnp.ones_like(loss))}


def _accuracy(model: Any, gamma: float, images: Images, batch_size: int) -> float:
    model.stack.inference_gamma = gamma
    correct = _correct(*nnx.split(model), images, batch_size)
    model.stack.inference_gamma = 0.0
    return float(correct) / len(images.labels)


@partial(jax.jit, static_argnums=(0, 3))
def _correct(graphdef, state, images, batch_size):
    return group_totals(nnx.merge(graphdef, state), _metrics, images, batch_size)["accuracy"][0]

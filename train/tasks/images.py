"""Image classification: small image sets, kept on the device as uint8, augmented there."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pydantic import Field

from bdia_jax import interop
from bdia_jax.models.linformer import LinformerAttention
from bdia_jax.models.resnet import ResNet
from bdia_jax.models.vit import ViT
from train.config import Config, Input, ModelConfig, PretrainedConfig, StandardConfig
from train.data.augment import augment
from train.datasets.registry import in_chunks, open_builder, open_split
from train.devices.mesh import open_mesh
from train.devices.shards import local_rows
from train.devices.totals import group_totals
from train.fields import LIST, Amount, Count, Float, Int, checked
from train.tasks.task import Metrics, Task, TaskKind


@checked
class ImageInput(Input):
    """Augmentation: RandAugment (0 operations for none), crop out of a padded image, flip.

    inference_gammas: constant gammas the trained model is evaluated with at the end (Fig. 1).
    """

    rand_augment_ops: Annotated[Int, Field(ge=0, le=1000)]
    rand_augment_magnitude: Annotated[Int, Field(ge=0, le=30)]
    crop_padding: Annotated[Int, Field(ge=0, le=1000)]
    flip: bool
    inference_gammas: Annotated[tuple[Annotated[Float, Field(ge=-0.5, le=0.5)], ...], LIST]

    def check(self, config: Config) -> None:
        if self.inference_gammas != (0.0,) and (config.model.name, config.stack) != ("vit", "bdia"):
            raise ValueError(
                f"input.inference_gammas is {self.inference_gammas} with model "
                f"{config.model.name!r} and stack {config.stack!r}; only a ViT with stack 'bdia' "
                "takes others than (0.0,)"
            )


@checked
class ViTConfig(StandardConfig):
    """The arguments of `bdia_jax.models.vit.ViT`; linformer_dim > 0 makes attention linear."""

    takes_revnet: ClassVar[bool] = True

    patch_size: Count
    linformer_dim: Amount
    shifted_patches: bool
    locality_attention: bool

    def check(self, config: Config) -> None:
        super().check(config)
        if self.linformer_dim and self.locality_attention:
            raise ValueError(
                f"model.linformer_dim is {self.linformer_dim} with model.locality_attention=True, "
                "two kinds of attention; set one to 0 or False"
            )


@checked
class ResNetConfig(ModelConfig):
    """The arguments of `bdia_jax.models.resnet.ResNet`."""

    widths: Annotated[tuple[Int, ...], LIST]
    depths: Annotated[tuple[Int, ...], LIST]

    def check(self, config: Config) -> None:
        super().check(config)
        if config.parts:
            raise ValueError(
                f"model 'resnet' with {config.parts}: its blocks have batch statistics, which "
                "parts of them would each update"
            )


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


def abstract(config: Config, tokenizer: Any = None) -> Task:
    """The task by its shapes, which the data set tells; it has to be prepared."""
    del tokenizer
    features = open_builder(config.dataset, config.data_dir).info.features
    return of_shape(config, features["image"].shape, features["label"].num_classes)


def of_shape(config: Config, shape: tuple[int, ...], num_classes: int) -> Task:
    """The task of images of a shape (height, width, channels), by shapes alone."""
    size = config.batch_size
    images = jax.ShapeDtypeStruct((size, *shape), jnp.uint8)
    batch = Images(images, jax.ShapeDtypeStruct((size,), jnp.int32))
    return make_task(config, batch, batch, num_classes)


def make_task(config: Config, train: Images, held_out: Images, num_classes: int) -> Task:
    """The task of telling `num_classes` classes of these images apart."""
    options: ImageInput = config.input

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

    make: Any = _MAKERS[config.model.name]
    if config.init_from:
        make = partial(make, config.init_from)
    arguments = config.model_arguments
    return Task(
        train_groups=(train,),
        eval_groups=(held_out,),
        make_model=lambda rngs: make(train.images.shape[1:], num_classes, **arguments, rngs=rngs),
        metrics=_metrics,
        describe=f"{len(train.images):,} images of {config.dataset}",
        prepare=prepare,
        finish=finish,
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


def _make_vit(image_shape, num_classes: int, *, linformer_dim: int, **arguments) -> ViT:
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
    return ViT(image_shape, num_classes, **arguments)


def _make_pretrained(folder: str, image_shape, num_classes: int, **arguments) -> ViT:
    """A ViT of a checkpoint's architecture; it sees the images in its own size."""
    model, described = interop.read_architecture(folder)
    if model is not ViT:
        raise ValueError(f"init_from {folder} is a {model.__name__}, which sees no images")
    if described["image_shape"][-1] != image_shape[-1]:
        raise ValueError(
            f"init_from {folder} takes images of shape {described['image_shape']}, the data set "
            f"has {image_shape}: other channels; take another checkpoint or data set"
        )
    changes: dict[str, Any] = {**arguments, "num_classes": num_classes}
    return ViT(**described | changes)


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


_MAKERS = {"vit": _make_vit, "resnet": ResNet, "pretrained": _make_pretrained}
_MODELS = {"vit": ViTConfig, "resnet": ResNetConfig, "pretrained": PretrainedConfig}
# the head is for classes that may be new, so it is trained beside adapters
_HEAD = nnx.All(nnx.Param, nnx.PathContains("head"))
KIND = TaskKind(ImageInput, _MODELS, load, abstract, head=_HEAD)

"""Small image sets: read once from TFDS, kept on the device as uint8, batched by step number."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from train.datasets.digits import Digits

# Builders of our own; they prepare themselves, without a download.
_BUNDLED: dict[str, Any] = {"digits": Digits}


class ImageSet(NamedTuple):
    """images: uint8 [N, height, width, channels]; labels: int32 [N]; num_classes."""

    images: jax.Array
    labels: jax.Array
    num_classes: int


def load_images(name: str, split: str, data_dir: str = "") -> ImageSet:
    """A whole split of a TFDS image classification set.

    Args:
        name: "digits", or any TFDS name with features "image" (of one shape) and "label".
        split: a TFDS split, slices such as "train[:90%]" included.
        data_dir: where TFDS keeps its data; "" for its default.

    Raises:
        FileNotFoundError: the set is not prepared; the message has the command that does it.
        ValueError: an unknown name or split.
    """
    builder = _builder(name, data_dir)
    try:
        source = builder.as_data_source(split)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}"
        ) from error
    examples = [(example["image"], example["label"]) for example in source]
    images = np.stack([image for image, _ in examples])
    labels = np.asarray([label for _, label in examples], np.int32)
    num_classes = builder.info.features["label"].num_classes
    return ImageSet(jnp.asarray(images), jnp.asarray(labels), num_classes)


def _builder(name: str, data_dir: str) -> Any:
    if name in _BUNDLED:
        builder = _BUNDLED[name](data_dir=data_dir or None, file_format="array_record")
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            builder.download_and_prepare()
        return builder
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"dataset is {name!r}, expected one of {', '.join(_BUNDLED)} or a TFDS name"
        ) from None
    # asked first: an unprepared set would look for itself on the network, for minutes if offline
    if not builder.is_prepared():
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise FileNotFoundError(
            f"dataset {name} is not prepared in {builder.data_dir}. Prepare it once, with a "
            "network connection, by\n"
            "    pip install -e '.[prepare]'\n"
            f"    tfds build {name} --file_format=array_record{where}\n"
            "or name the folder that has it with --config.data_dir=DIR"
        )
    return builder


def batch_indices(key: jax.Array, step: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """int32 [batch_size]: the examples of a step. A function of (key, step) alone.

    Every epoch is a new permutation without its last, incomplete batch.
    """
    steps_per_epoch = num_examples // batch_size
    epoch, position = jnp.divmod(step, steps_per_epoch)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))


def augment(key: jax.Array, images: jax.Array, crop_padding: int, flip: bool) -> jax.Array:
    """Random crop out of a zero-padded image, and random horizontal flip, image by image.

    Args:
        images: [B, height, width, channels], any dtype.
        crop_padding: pixels of padding on each side; 0 for no crop.
        flip: whether to mirror half of the images.
    """
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        pad = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
        corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * crop_padding + 1)

        def crop(image, corner):
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

        images = jax.vmap(crop)(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def normalize(images: jax.Array) -> jax.Array:
    """uint8 0..255 to float32 -1..1."""
    return images.astype(jnp.float32) / 127.5 - 1.0

"""Image augmentation inside the training step: RandAugment, random crop, horizontal flip.

RandAugment has the operations, ranges and oddities of the code base whose recipe the paper trains
CIFAR with (github.com/kentaroy47/vision-transformers-cifar10, randomaug.py), with Pillow's
arithmetic. A switch over 16 operations would, once vectorized, run them all for every image.
So every operation is the same four stages, of which all but one are the identity:
an affine warp, a table of 256 grey levels for each channel, a blend, a rectangle.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_NAMES = """autocontrast equalize invert rotate posterize solarize solarize_add color contrast
    brightness sharpness shear_x shear_y cutout translate_x translate_y"""
OPS = tuple(_NAMES.split())

# Ranges of the operations that have a strength, at magnitudes 0 and 30. They were made for images
# of 224 pixels: at magnitude 14 a translation of 47 pixels leaves nothing of a CIFAR image.
_RANGES = {
    "rotate": (0, 30),  # degrees
    "posterize": (0, 4),  # bits that are kept, at least one
    "solarize": (0, 256),  # the threshold: larger magnitudes invert less
    "solarize_add": (0, 110),
    "enhance": (0.1, 1.9),  # color, contrast, brightness, sharpness: the image's share
    "shear_x": (0.0, 0.3),
    "shear_y": (0.0, 0.3),
    "cutout": (0, 40),  # pixels
    "translate_x": (0.0, 100),  # pixels
    "translate_y": (0.0, 100),
}
_CUTOUT_COLOR = (125, 123, 114)


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    rand_augment_ops: int = 0,
    rand_augment_magnitude: int = 14,
    crop_padding: int = 0,
    flip: bool = False,
) -> jax.Array:
    """RandAugment, then a random crop, then a random flip, with a draw of its own for each image.

    Args:
        key: a PRNG key; the result is a function of it and the images.
        images: uint8 [B, height, width, channels], 1 or 3 channels.
        rand_augment_ops: operations applied in a row to each image, drawn with replacement; 0 for
            no RandAugment. The paper's recipe has 2.
        rand_augment_magnitude: their strength, 0 to 30; the paper's recipe has 14.
        crop_padding: black pixels added on each side before the crop; 0 for no crop.
        flip: whether to mirror half of the images.

    Returns: uint8, the shape of images.

    Raises:
        ValueError: a magnitude or a number of channels out of range.
    """
    op_key, crop_key, flip_key = jax.random.split(key, 3)
    batch = len(images)
    for k in jax.random.split(op_key, rand_augment_ops) if rand_augment_ops else ():
        choice_key, sign_key, place_key = jax.random.split(k, 3)
        op = jax.random.randint(choice_key, (batch,), 0, len(OPS))
        negative = jax.random.bernoulli(sign_key, shape=(batch,))
        place = jax.random.uniform(place_key, (batch, 2))
        images = apply_ops(images, op, negative, place, rand_augment_magnitude)
    if crop_padding:
        pad = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * crop_padding + 1)

        def crop(image, corner):
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

        images = jax.vmap(crop)(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def apply_ops(
    images: jax.Array, op: jax.Array, negative: jax.Array, place: jax.Array, magnitude: int
) -> jax.Array:
    """One RandAugment operation for each image, equal to Pillow's to the bit but for one case.

    The case: where autocontrast's new level is a whole number, Pillow's floating point may fall
    short of it and truncate to the level below (0.4 % of all table entries).

    Args:
        images: uint8 [B, height, width, channels], 1 or 3 channels.
        op: int32 [B], indices into OPS.
        negative: bool [B], the sign of a rotation, shear or translation.
        place: float32 [B, 2] in [0, 1), where cutout's rectangle lies (x, y).
        magnitude: the strength, 0 to 30, known when compiling: the tables are made by NumPy.

    Returns: uint8, the shape of images.
    """
    if not 0 <= magnitude <= 30:
        raise ValueError(f"RandAugment's magnitude is {magnitude}, expected 0 to 30")
    if images.shape[-1] not in (1, 3) or images.dtype != jnp.uint8:
        raise ValueError(
            f"images are {images.dtype} {images.shape}, expected uint8 [B, height, width, 1 or 3]"
        )
    values = {
        name: magnitude / 30 * float(high - low) + low for name, (low, high) in _RANGES.items()
    }
    affines = jnp.asarray(_affines(values, *images.shape[1:3]))
    images = _warp(images, affines[op, negative.astype(int)])
    images = _apply_tables(images, _tables(images, op, values))
    images = _blend(images, op, values)
    return jnp.where(_is(op, "cutout"), _cutout(images, place, values["cutout"]), images)


def _is(op, *names):
    """bool [B, 1, 1, 1]."""
    return jnp.isin(op, jnp.array([OPS.index(name) for name in names]))[:, None, None, None]


def _affines(values, height, width):
    """int32 [ops, 2, 6]: a, b, c, d, e, f of x_in = (a x + b y + c) / 2^16, y_in likewise.

    Pillow samples at pixel centres with 16 fractional bits, for matrices it computes in float64.
    """
    matrices = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (len(OPS), 2, 1))
    for sign, row in ((1, 0), (-1, 1)):
        angle = -math.radians(sign * values["rotate"])
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        rotation = [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
        matrices[OPS.index("rotate"), row] = rotation
        for name, entry in (("shear_x", 1), ("translate_x", 2), ("shear_y", 3), ("translate_y", 5)):
            matrices[OPS.index(name), row, entry] = sign * values[name]
    for a, b, c in ((0, 1, 2), (3, 4, 5)):
        matrices[..., c] += (matrices[..., a] + matrices[..., b]) / 2
    return np.floor(matrices * 2**16 + 0.5).astype(np.int32)


def _warp(images, affine):
    """Nearest sampling, black outside."""
    batch, height, width, channels = images.shape
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    a, b, c, d, e, f = jnp.moveaxis(affine, 1, 0)[..., None, None]
    x_in, y_in = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (x_in >= 0) & (x_in < width) & (y_in >= 0) & (y_in < height)
    index = jnp.where(inside, y_in * width + x_in, 0).reshape(batch, -1, 1)
    pixels = jnp.take_along_axis(images.reshape(batch, -1, channels), index, axis=1)
    return jnp.where(inside[..., None], pixels.reshape(images.shape), 0)


def _tables(images, op, values):
    """uint8 [B, channels, 256]: the new level of every level."""
    batch, height, width, channels = images.shape
    levels = jnp.arange(256)
    pixels = images.reshape(batch, -1, channels).astype(jnp.int32)
    low, high = pixels.min(1)[..., None], pixels.max(1)[..., None]
    span = high - low
    stretched = jnp.where(span > 0, (levels - low) * 255 // jnp.maximum(span, 1), levels)

    image, channel = jnp.arange(batch)[:, None, None], jnp.arange(channels)
    counts = jnp.zeros((batch, channels, 256), jnp.int32).at[image, channel, pixels].add(1)
    below = counts.cumsum(-1) - counts
    step = (height * width - (counts * (levels == high)).sum(-1, keepdims=True)) // 255
    equalized = jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), levels)

    total = _grey(images).sum((1, 2, 3))
    mean = (2 * total + height * width) // (2 * height * width)  # rounded
    contrast = jnp.asarray(_blend_table(values["enhance"]))[mean][:, None]

    is_op = {name: _is(op, name)[..., 0] for name in ("autocontrast", "equalize", "contrast")}
    tables = jnp.asarray(_static_tables(values))[op][:, None]
    tables = jnp.where(is_op["autocontrast"], jnp.clip(stretched, 0, 255).astype(jnp.uint8), tables)
    tables = jnp.where(is_op["equalize"], jnp.clip(equalized, 0, 255).astype(jnp.uint8), tables)
    return jnp.where(is_op["contrast"], contrast, tables)


def _static_tables(values):
    """uint8 [ops, 256]: tables that no image changes, the identity for all other operations."""
    levels = np.arange(256)
    tables = np.tile(levels, (len(OPS), 1))
    tables[OPS.index("invert")] = 255 - levels
    tables[OPS.index("posterize")] = levels & -(1 << (8 - max(1, int(values["posterize"]))))
    tables[OPS.index("solarize")] = np.where(levels < values["solarize"], levels, 255 - levels)
    added = np.clip(levels + values["solarize_add"], 0, 255).astype(int)
    tables[OPS.index("solarize_add")] = np.where(added < 128, added, 255 - added)
    tables[OPS.index("brightness")] = _blend_table(values["enhance"])[0]
    return tables.astype(np.uint8)


def _apply_tables(images, tables):
    batch, _, _, channels = images.shape
    pixels = jnp.moveaxis(images, 3, 1).reshape(batch, channels, -1).astype(jnp.int32)
    new = jnp.take_along_axis(tables, pixels, axis=2)
    return jnp.moveaxis(new.reshape(batch, channels, *images.shape[1:3]), 1, 3)


def _blend_table(share):
    """uint8 [256, 256]: Pillow's blend of a degenerate image's level and an image's level.

    It truncates a float32, which no compiler may round differently: hence NumPy, not JAX.
    """
    degenerate, level = np.arange(256, dtype=np.float32)[:, None], np.arange(256, dtype=np.float32)
    blended = degenerate + np.float32(share) * (level - degenerate)
    return np.clip(blended, 0, 255).astype(np.uint8)


def _blend(images, op, values):
    """Color and sharpness: blends with the grey image and with the smoothed one."""
    degenerate = jnp.where(_is(op, "color"), _grey(images), _smooth(images))
    table = jnp.asarray(_blend_table(values["enhance"]))
    blended = table[degenerate, images.astype(jnp.int32)]
    return jnp.where(_is(op, "color", "sharpness"), blended, images)


def _grey(images):
    """int32 [B, height, width, 1]: Pillow's luminance."""
    if images.shape[-1] == 1:
        return images.astype(jnp.int32)
    weighted = images.astype(jnp.int32) * jnp.array([19595, 38470, 7471])
    return (weighted.sum(-1, keepdims=True) + 2**15) >> 16


def _smooth(images):
    """int32: the mean of 3 x 3 pixels, the middle one counted 5 times; the border is kept."""
    pixels = images.astype(jnp.int32)
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = pixels[:, 1:-1, 1:-1]
    return pixels.at[:, 1:-1, 1:-1].set((2 * (box + 4 * inner) + 13) // 26)


def _cutout(images, place, side):
    """A square of one colour; its middle is drawn from (1, size], as the code base does it."""
    height, width, channels = images.shape[1:]
    size = jnp.array([width, height])
    middle = size - (size - 1) * place
    start = jnp.floor(jnp.maximum(middle - side / 2, 0)).astype(int)
    stop = start + int(side)  # Pillow's rectangles include it
    x, y = jnp.arange(width)[:, None], jnp.arange(height)[:, None, None]
    start, stop = start[:, :, None, None, None], stop[:, :, None, None, None]
    covered = (x >= start[:, 0]) & (x <= stop[:, 0]) & (y >= start[:, 1]) & (y <= stop[:, 1])
    color = jnp.array(_CUTOUT_COLOR, jnp.uint8)
    color = color if channels == 3 else _grey(color[None]).astype(jnp.uint8)
    return jnp.where(covered, color, images)

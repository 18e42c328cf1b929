"""Augmentation: every RandAugment operation against Pillow, the draws, crop and flip."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_image

from train.data.augment import OPS, apply_ops, augment

SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
apply = jax.jit(apply_ops, static_argnums=4)
augmented = jax.jit(
    augment,
    static_argnames=("rand_augment_ops", "rand_augment_magnitude", "crop_padding", "flip"),
)
KEY = jax.random.key(0)


def photos():
    """uint8 [12, 32, 32, 3]: six patches of each photo, the last one with flat channels."""
    patches = [
        load_sample_image(name)[y : y + 64 : 2, x : x + 64 : 2]
        for name in ("china.jpg", "flower.jpg")
        for y, x in ((0, 0), (100, 400), (180, 250), (250, 80), (300, 500), (340, 320))
    ]
    patches[-1] = patches[-1] * np.array([1, 0, 0], np.uint8) + np.array([0, 9, 255], np.uint8)
    return np.stack(patches)


def digits():
    return np.round(load_digits().images[:12, ..., None] * (255 / 16)).astype(np.uint8)


def pillow(name, pixels, negative, place, magnitude):
    """The operation as the recipe's code base does it, with Pillow."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    width, height = image.size
    share = magnitude / 30
    sign = -1 if negative else 1

    def affine(*matrix):
        return lambda: image.transform(image.size, Image.Transform.AFFINE, matrix)

    def solarize_add():
        brighter = np.clip(np.array(image).astype(int) + 110 * share, 0, 255).astype(np.uint8)
        return ImageOps.solarize(Image.fromarray(brighter), 128)

    def cutout():
        side = 40 * share
        x, y = (
            size - (size - 1) * float(p) for size, p in zip((width, height), place, strict=True)
        )
        x, y = int(max(0, x - side / 2)), int(max(0, y - side / 2))
        box = (x, y, min(width, x + side), min(height, y + side))
        color = (125, 123, 114)
        grey = Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0))
        copy = image.copy()
        ImageDraw.Draw(copy).rectangle(box, color if image.mode == "RGB" else grey)
        return copy

    def enhance(kind):
        return lambda: kind(image).enhance(share * (1.9 - 0.1) + 0.1)

    shear, shift = sign * 0.3 * share, sign * 100.0 * share
    result = {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "rotate": lambda: image.rotate(sign * 30 * share),
        "posterize": lambda: ImageOps.posterize(image, max(1, int(4 * share))),
        "solarize": lambda: ImageOps.solarize(image, 256 * share),
        "solarize_add": solarize_add,
        "color": enhance(ImageEnhance.Color),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": affine(1, shear, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, shear, 1, 0),
        "cutout": cutout,
        "translate_x": affine(1, 0, shift, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, shift),
    }[name]()
    return np.array(result).reshape(pixels.shape)


def ours_and_pillows(images, magnitude):
    """{(op, negative): (before, ours, Pillow's)}, each uint8 [N, height, width, channels]."""
    cases = [(op, negative) for op in range(len(OPS)) for negative in (False, True)]
    count = len(images)
    places = np.random.default_rng(magnitude).random((len(cases), count, 2), np.float32)
    op, negative = np.repeat(cases, count, 0).T
    batch = np.tile(images, (len(cases), 1, 1, 1))
    ours = np.asarray(apply(batch, op, negative == 1, places.reshape(-1, 2), magnitude))
    found = {}
    for (op, negative), own, at in zip(cases, ours.reshape(-1, *images.shape), places, strict=True):
        pixels = zip(images, at, strict=True)
        expected = [pillow(OPS[op], image, negative, place, magnitude) for image, place in pixels]
        found[OPS[op], negative] = (images, own, np.stack(expected))
    return found


@pytest.mark.claim("augmentation is Pillow's")
@pytest.mark.parametrize(
    ("images", "magnitude"),
    [
        (photos, 8),
        pytest.param(photos, 14, marks=pytest.mark.full),
        pytest.param(photos, 28, marks=pytest.mark.full),
        pytest.param(photos, 0, marks=pytest.mark.full),
        pytest.param(digits, 14, marks=pytest.mark.full),
    ],
)
def test_every_operation_is_pillows(images, magnitude):
    found = ours_and_pillows(images(), magnitude)
    for (name, negative), (before, ours, expected) in found.items():
        if name == "autocontrast":
            # where the new level is a whole number Pillow's float64 may fall short of it
            pixels = before.astype(int)
            low, high = pixels.min((1, 2), keepdims=True), pixels.max((1, 2), keepdims=True)
            whole = (pixels - low) * 255 % np.maximum(high - low, 1) == 0
            shortfall = ours.astype(int) - expected
            assert (shortfall[~whole] == 0).all() and set(shortfall[whole].tolist()) <= {0, 1}
        else:
            different = np.argwhere(ours != expected)
            assert not len(different), (name, negative, len(different), different[:3])
    # the recipe's range is that of large images: 47 pixels at magnitude 14 leave nothing of CIFAR's
    for name in ("translate_x", "translate_y"):
        assert found[name, True][1].any() == (magnitude < 9)


@pytest.mark.control("augmentation is Pillow's")
def test_the_comparison_can_fail():
    """Each operation changes the photos, differs from all others, and its sign matters."""
    at = ours_and_pillows(photos(), 8)
    for name in OPS:
        before, ours, _ = at[name, False]
        assert (ours != before).mean() > 0.04, name
        for other in set(OPS) - {name}:
            assert (ours != at[other, False][2]).mean() > 0.04, (name, other)
        opposite = (ours != at[name, True][1]).mean()
        assert opposite > 0.2 if name in SIGNED | {"cutout"} else opposite == 0, name


@pytest.mark.full
def test_all_operations_and_signs_are_drawn():
    photo, count, magnitude = photos()[10:11], 2048, 5
    images = np.repeat(photo, count, 0)
    draws = functools.partial(augmented, rand_augment_ops=1, rand_augment_magnitude=magnitude)
    seen = collections.Counter(image.tobytes() for image in np.asarray(draws(KEY, images)))
    cases = collections.defaultdict(list)
    for case, (_, ours, _) in ours_and_pillows(photo, magnitude).items():
        if case[0] != "cutout":
            cases[ours[0].tobytes()].append(case)
    for image, same in cases.items():
        assert len({name for name, _ in same}) == 1
        assert seen.pop(image, 0) / count == pytest.approx(len(same) / 32, rel=0.35), same
    # all that is left is cutout, here and there
    assert sum(seen.values()) / count == pytest.approx(1 / 16, rel=0.35) and len(seen) > 50


@pytest.mark.full
def test_two_operations_are_two_draws():
    images = np.repeat(photos()[:1], 256, 0)
    one = np.asarray(augmented(KEY, images, rand_augment_ops=1))
    two = np.asarray(augmented(KEY, images, rand_augment_ops=2))
    kinds = [len({image.tobytes() for image in batch}) for batch in (images, one, two)]
    assert kinds[0] == 1 and 16 <= kinds[1] < kinds[2]
    again = np.asarray(augmented(KEY, images, rand_augment_ops=2))
    other = np.asarray(augmented(jax.random.key(2), images, rand_augment_ops=2))
    assert (again == two).all() and (other != two).any()


@pytest.mark.full
def test_vmap_over_batches():
    images = photos().reshape(3, 4, 32, 32, 3)
    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(functools.partial(augment, rand_augment_ops=1, flip=True)))
    got = mapped(keys, images)
    expected = [
        augmented(k, x, rand_augment_ops=1, flip=True) for k, x in zip(keys, images, strict=True)
    ]
    assert got.shape == images.shape and got.dtype == jnp.uint8
    assert (np.asarray(got) == np.stack(expected)).all()


def test_bad_arguments():
    images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    with pytest.raises(ValueError, match="magnitude is 31, expected 0 to 30"):
        augment(KEY, images, rand_augment_ops=2, rand_augment_magnitude=31)
    with pytest.raises(ValueError, match=r"expected uint8 \[B, height, width, 1 or 3\]"):
        augment(KEY, images[..., :2], rand_augment_ops=2)
    with pytest.raises(ValueError, match="images are float32"):
        augment(KEY, images.astype(jnp.float32), rand_augment_ops=2)


def test_crop_shifts_and_flip_mirrors():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    images = jnp.asarray(np.repeat(image, 256, 0))
    assert (augment(KEY, images) == images).all()
    mirrored = np.asarray(augment(KEY, images, flip=True))
    kinds = [m.tobytes() for m in mirrored]
    assert set(kinds) == {image[0].tobytes(), image[0][:, ::-1].tobytes()}
    assert 96 < kinds.count(image[0].tobytes()) < 160
    cropped = np.asarray(augment(KEY, images, crop_padding=1))
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {c.tobytes() for c in cropped} == windows


@pytest.mark.full
def test_crop_and_flip_follow_rand_augment():
    """The border that a crop adds stays black: it is added after the grey levels change."""
    images = np.full((512, 8, 8, 1), 200, np.uint8)
    after = np.asarray(augmented(KEY, images, rand_augment_ops=1, crop_padding=4, flip=True))
    inverted = after[(after == 55).any((1, 2, 3))]  # 255 - 200
    shifted = inverted[(inverted != 55).any((1, 2, 3))]
    assert len(shifted) > 8 and set(np.unique(shifted)) == {0, 55}

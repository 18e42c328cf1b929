"""Fields of a config.json: of which kinds they are, and how it is told what is wrong with one."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

REQUIRED = object()  # in place of a default
_INT, _FLOAT = 2**31 - 1, 3.4e38  # numbers have to fit into the device's int32 and float32


class Field(NamedTuple):
    """What a field of JSON has to be.

    Attributes:
        expected: in words.
        fits: whether a value is that.
        default: the value where the field is absent; by default it must not be.
        remedy: what to do about another value.
    """

    expected: str
    fits: Callable[[Any], bool]
    default: Any = REQUIRED
    remedy: str = "correct it, or copy the file again"

    def by_default(self, value: Any) -> "Field":
        """May be absent."""
        return self._replace(default=value)

    def or_null(self) -> "Field":
        """May be null, and absent."""
        fits = self.fits
        expected = f"{self.expected}, or null"
        return Field(expected, lambda value: value is None or fits(value), None, self.remedy)


def whole(least: int) -> Field:
    """A whole number, as transformers takes it: neither 2.0 nor true."""
    return Field(
        f"a whole number from {least} to {_INT}",
        lambda value: type(value) is int and least <= value <= _INT,
    )


def number(words: str, fits: Callable[[float], bool]) -> Field:
    """A finite number; an int stands for a float."""
    return Field(
        words,
        # compared, since an int may be greater than any float
        lambda value: type(value) in (int, float) and -_FLOAT <= value <= _FLOAT and fits(value),
    )


def several(field: Field, words: str) -> Field:
    """A list of them, which may be empty."""
    return Field(words, lambda value: isinstance(value, list) and all(map(field.fits, value)))


def either(first: Field, second: Field) -> Field:
    return Field(
        f"{first.expected}, or {second.expected}",
        lambda value: first.fits(value) or second.fits(value),
    )


def implemented(*values: Any) -> Field:
    """One of these. Where it is absent it is one of them, too, whichever."""
    return Field(
        " or ".join(map(repr, values)),
        lambda value: any(type(value) is type(each) and value == each for each in values),
        values[0],
        "nothing else is implemented",
    )


COUNT, AMOUNT = whole(1), whole(0)
POSITIVE = number("a number greater than 0", lambda value: value > 0)
NOT_NEGATIVE = number("a number from 0 on", lambda value: value >= 0)
SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
FLAG = Field("true or false", lambda value: isinstance(value, bool))
OBJECT = Field("an object", lambda value: isinstance(value, dict))
TOKENS = either(AMOUNT, several(AMOUNT, "several in a list")).or_null()
_ANY_TOKEN = whole(-_INT)  # some write -1 for none
_LABELS = Field(
    'names of classes by their number, as in {"0": "cat"}',
    lambda value: (
        isinstance(value, dict)
        and all(key.isdecimal() and type(label) in (str, int) for key, label in value.items())
    ),
)

# Of every architecture. Not all are used here, but all are written back.
COMMON = {
    "bos_token_id": _ANY_TOKEN.or_null(),
    "pad_token_id": _ANY_TOKEN.or_null(),
    "eos_token_id": TOKENS,
    "initializer_range": SHARE.by_default(0.02),
    "use_cache": FLAG.by_default(True),
    "id2label": _LABELS.or_null(),
}


def read_fields(
    values: Mapping[str, Any], fields: Mapping[str, Field], group: str = ""
) -> dict[str, Any]:
    """The value of each of these fields, which may be its default.

    Args:
        values: of an object in JSON.
        fields: by their names.
        group: name and dot of the object, where it is a field itself.

    Raises:
        ValueError: one that is missing, or of another kind than it has to be.
    """
    read = {name: values.get(name, field.default) for name, field in fields.items()}
    for name, field in fields.items():
        if read[name] is REQUIRED:
            raise ValueError(f"no field {group}{name}, expected {field.expected}; {field.remedy}")
        if name in values and not field.fits(read[name]):
            raise ValueError(
                f"{group}{name} is {reprlib.repr(read[name])}, expected {field.expected}; "
                f"{field.remedy}"
            )
    return read


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """What is wrong with fields is told with the file that has them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_divides(name: str, value: int, divisor: str, by: int) -> None:
    """Raises ValueError unless `value` is a multiple of `by`."""
    if value % by:
        raise ValueError(
            f"{name} is {value}, which {divisor} = {by} does not divide; correct one of them"
        )

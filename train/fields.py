"""Fields of a config: of which kinds they are, and how it is told what is wrong with one."""

import dataclasses
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

# Numbers have to fit into the device's int32 and float32.
Int = Annotated[int, Field(ge=1 - 2**31, le=2**31 - 1)]
Count = Annotated[Int, Field(ge=1)]
Amount = Annotated[Int, Field(ge=0)]
Float = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "True or False",
    "tuple_type": "several, as in '(1, 2)'",
    "literal_error": "one of {expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
_EXPECTED |= dict.fromkeys(
    ("string_type", "string_unicode", "string_pattern_mismatch"), "text, without zero bytes"
)

_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=False, field_specifiers=(Field,))
def checked(cls: _Class) -> _Class:
    """A frozen dataclass whose values have to be of its annotations (pydantic's, strictly).

    An int stands for a float, too, and a list for a tuple marked `LIST`. A class says by `group`
    where a config has its fields. What is wrong is a ValueError, each in a few words.
    """
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    made: Any = dataclass(cls, frozen=True, config=rules)
    init = made.__init__

    def __init__(self, *args, **kwargs):
        try:
            return init(self, *args, **kwargs)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        raise ValueError("; ".join(_described(made, each) for each in problems))

    made.__init__ = __init__
    return made


def _described(cls: Any, problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    field, *rest = problem["loc"]
    if isinstance(field, int):  # an argument without a name
        field = dataclasses.fields(cls)[field].name
    name = ".".join(map(str, [*filter(None, [cls.group]), field, *rest]))
    if kind == "missing":
        return f"no field {name}"
    if kind == "unexpected_keyword_argument":
        return f"unknown field {name}"
    expected = (_EXPECTED.get(kind) or problem["msg"]).format(**context)
    return f"{name} is {short(problem['input'])}, expected {expected}"


def short(value: Any) -> str:
    """repr(value), cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an int of thousands of digits
        return f"an int of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"

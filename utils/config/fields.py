"""Types of the values in config files. Each checks one value and says what it expects."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    WrapValidator,
)
from pydantic_core import PydanticSerializationError

from utils.files import expand_path

Modality = Literal["CT", "MR", "PT", "NM", "US", "XA", "OT"]  # DICOM (0008,0060) of volumes
WINDOWS_DEVICES = r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(\..*)?"


class Section(BaseModel):
    """The base of every section of a config file: unknown keys and other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def model_dump(self, **options) -> dict[str, Any]:
        """Return the settings as plain values."""
        try:
            return super().model_dump(**options)
        except PydanticSerializationError as e:
            if isinstance(e.__cause__, Exception | None):
                raise
            raise e.__cause__ from None  # Stopped, by a signal that came just then


def as_text(value: Any) -> Any:
    """Strip text and turn a number into text (fold 0 is "0"); true and false fail later."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value.strip() if isinstance(value, str) else value


def not_empty(value: str) -> str:
    if not value:
        raise ValueError("empty text")
    return value


def quoted_if_bool(value: Any) -> Any:
    if isinstance(value, bool):
        word = str(value).lower()
        raise ValueError(f"expected text; if the word {word} is meant, write '\"{word}\"'")
    return as_text(value)


def no_repeats(values: list[str]) -> list[str]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"listed twice: {', '.join(twice)}")
    return values


def folder_name(name: str) -> str:
    """Return the name if it is one folder inside results_dir on every system."""
    if len(name) > 100 or len(name.encode(errors="replace")) > 250:
        raise ValueError("at most 100 characters")
    if not name.isprintable() or re.search(r'[/\\:*?"<>|]', name):
        raise ValueError('one folder name, without / \\ : * ? " < > | and control characters')
    if name.endswith("."):
        raise ValueError("one folder name, not . or .. and without a dot at its end")
    if re.fullmatch(WINDOWS_DEVICES, name, re.IGNORECASE):
        raise ValueError("a reserved name on Windows")
    return name


def rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected the lower value first: [{pair[1]:g}, {pair[0]:g}]")
    return pair


def not_equal(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] == pair[1]:
        raise ValueError("the two values must differ")
    return pair


def one_or_more(value: Any) -> Any:
    """Return a path or a number alone as a list of one."""
    return [value] if isinstance(value, str | int) else value


def one_or_each(value: Any, check: Any) -> Any:
    """Check a value alone, or each of a list, which becomes a tuple."""
    return tuple(map(check, value)) if isinstance(value, list) else check(value)


def or_word(kind: Any, word: str, expected: str) -> Any:
    """Return the type of values that are either `word` or of the type `kind`."""

    def check(value: Any, check_kind: Any) -> Any:
        if isinstance(value, str) and value != word:
            raise ValueError(f"expected {expected}, or {word}")
        return value if value == word else check_kind(value)

    either = WrapValidator(check, json_schema_input_type=Literal[word] | kind)
    return Annotated[kind, either, PlainSerializer(lambda value: value)]


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Angle = Annotated[float, Field(ge=0, le=180)]
Percent = Annotated[float, Field(ge=0, le=100)]
Axes = Annotated[tuple[bool, bool, bool], Strict(False)]  # x, y, z
Angles = Annotated[tuple[Angle, Angle, Angle], Strict(False)]  # about x, y, z
Size = Annotated[tuple[Positive, Positive, Positive], Strict(False)]  # voxels
Text = Annotated[str, BeforeValidator(quoted_if_bool), AfterValidator(not_empty)]
Texts = Annotated[list[Text], AfterValidator(no_repeats)]
PathText = Annotated[Text, AfterValidator(expand_path)]
Paths = Annotated[
    list[PathText],
    Field(min_length=1),
    BeforeValidator(one_or_more, json_schema_input_type=Text | list[Text]),
]
Name = Annotated[Text, AfterValidator(folder_name)]
Range = Annotated[
    tuple[float, float], Strict(False), AfterValidator(rising), AfterValidator(not_equal)
]
Percentiles = Annotated[
    tuple[Percent, Percent], Strict(False), AfterValidator(rising), AfterValidator(not_equal)
]
Modalities = Annotated[
    Literal["auto", Modality],
    WrapValidator(one_or_each, json_schema_input_type=Literal["auto", Modality] | list[Modality]),
    PlainSerializer(lambda value: list(value) if isinstance(value, tuple) else value),
]
Factors = Annotated[tuple[AboveZero, AboveZero], Strict(False), AfterValidator(rising)]
Fractions = Annotated[tuple[Fraction, Fraction], Strict(False), AfterValidator(rising)]
Millimetres = Annotated[tuple[AboveZero, AboveZero, AboveZero], Strict(False)]
Spacing = or_word(Millimetres, "native", "three numbers in mm")


# ---- in words
def in_words(rule: Mapping[str, Any], comment: str = "", s: str = "") -> str:
    """Describe in a few words, for --help, what a value may be.

    Args:
        rule: the JSON schema that pydantic makes from the type of the value.
        comment: choices, or null, that it names are not repeated.
        s: "s" for the plural.
    """
    if "anyOf" in rule:
        return " or ".join(filter(None, (in_words(x, comment, s) for x in rule["anyOf"])))
    choices = rule.get("enum", [rule["const"]] if "const" in rule else [])
    if rule.get("type") == "null":
        choices = ["null"]
    if choices:
        named = all(re.search(rf"\b{choice}\b", comment) for choice in choices)
        return "" if named else " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    if "prefixItems" in rule:
        return f"{len(rule['prefixItems'])} {in_words(rule['prefixItems'][0], comment, 's')}"
    if "items" in rule:
        least = f"{rule['minItems']} or more " if rule.get("minItems", 1) > 1 else ""
        inside = in_words(rule["items"], comment, "s")
        return f"list{s} of {least}{inside}" if inside else f"list{s}"
    if "multipleOf" in rule:
        return f"multiple{s} of {rule['multipleOf']}, from {rule['minimum']}"
    kinds = {"integer": f"whole number{s}", "number": f"number{s}", "string": f"text{s}"}
    kinds["boolean"] = "times true or false" if s else "true or false"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
    bounds["exclusiveMaximum"] = "below"
    limits = [f"{word} {rule[bound]}" for bound, word in bounds.items() if bound in rule]
    return " ".join([kinds.get(rule.get("type"), ""), *limits])

"""The rules of segmentation_config.yaml (see `utils.config.schema`)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from utils.classes import class_problems
from utils.config import fields as f
from utils.config import schema

Values = Annotated[
    list[int], BeforeValidator(f.one_or_more, json_schema_input_type=int | list[int])
]


def label(value: Any) -> int | str:
    """Check one entry of a class."""
    if type(value) is not int and not (isinstance(value, str) and value):
        raise ValueError("expected a label value (a whole number), or the name of a file or column")
    return value


Label = Annotated[int | str, PlainValidator(label, json_schema_input_type=int | str)]
Labels = Annotated[
    list[Label], BeforeValidator(f.one_or_more, json_schema_input_type=int | str | list[int | str])
]


def not_turned_round(classes: Any) -> Any:
    """Refuse {1: liver}, as in nnU-Net's older files, with what to write."""
    if isinstance(classes, dict) and classes:
        names = {v: k for k, v in classes.items() if isinstance(v, str) and str(k).isdecimal()}
        if len(names) == len(classes):
            right = ", ".join(f"{name}: {value}" for name, value in names.items() if value != "0")
            raise ValueError(f"turned round: the name comes first: {{{right}}}")
    return classes


class Patches(f.Section):
    size: f.Size
    per_case: f.Positive
    foreground: f.Fraction


class Augment(schema.IntensityAugment):
    flip: f.Axes
    mirror_pairs: list[list[f.Text]]
    rotate: f.Angles
    zoom: f.Factors
    stretch: Annotated[float, Field(ge=1)]
    elastic: f.NotNegative
    low_res: Annotated[float, Field(ge=1)]


class Loss(f.Section):
    dice: f.NotNegative
    ce: f.NotNegative
    deep_supervision: bool


class Finetune(f.Section):
    freeze_epochs: f.Count
    encoder_lr: f.AboveZero
    fit_outputs: bool


class Inference(f.Section):
    overlap: Annotated[float, Field(ge=0, le=0.9)]
    batch: f.Positive
    mirror: f.Axes
    tolerance: f.AboveZero


# The keys that a test takes from the config at hand; all others come from the checkpoint.
OF_THE_TEST = (
    "experiment results_dir cache_dir csv_path test_folds test_ckpt allow_seen_patients precision "
    "n_workers inference"
).split()


class SegmentationConfig(schema.FineTuned):
    classes: Annotated[dict[f.Text, Labels], BeforeValidator(not_turned_round)]
    ignore_labels: Values
    optimizer: Literal["adamw", "sgd"]
    val_every: f.Positive
    patches: Patches
    augment: Augment
    loss: Loss
    finetune: Finetune
    inference: Inference


def impossible_segmentation(
    values: schema.Values, facts_of: schema.FactsOf, cv: bool = False, predicted: str | None = None
) -> schema.Wrong:
    """Find values that contradict each other, --cv or --predict, or that the backbone cannot take.

    cv: whether --cv is given. predicted: the path of --predict, if it is given.
    """
    facts = facts_of(values, True)
    yield from schema.impossible_run(values, predicted)
    yield from schema.impossible_cv(values, predicted) if cv else ()
    yield from schema.impossible_freezing(values)
    yield from schema.impossible_size("patches.size", values, facts)
    if values.get("loss.dice") == values.get("loss.ce") == 0:
        yield "loss.ce", "0, and so is loss.dice: nothing to learn from"
    if values.get("loss.deep_supervision") and facts and len(facts.strides) == 2:
        yield "loss.deep_supervision", "true, but a decoder of one stage has one map only"
    classes = values.get("classes")
    if isinstance(classes, dict) and all(map(_are_labels, classes.values())):
        ignore, pairs = values.get("ignore_labels", []), values.get("augment.mirror_pairs", [])
        yield from class_problems(classes, f.one_or_more(ignore), pairs)


def _are_labels(value: Any) -> bool:
    """Return whether the schema takes a value; if it does not, that is reported already."""
    values = f.one_or_more(value)
    return isinstance(values, list) and all(type(x) in (int, str) and x != "" for x in values)

"""The rules of segmentation_config.yaml (see `utils.config.schema`)."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from utils.classes import class_problems
from utils.config.fields import (
    STRICT,
    AboveZero,
    Angles,
    Axes,
    Count,
    Factors,
    Fraction,
    NotNegative,
    Positive,
    Size,
    Text,
    one_or_more,
)
from utils.config.schema import (
    FactsOf,
    FineTuned,
    IntensityAugment,
    Values,
    Wrong,
    impossible_run,
    impossible_size,
    longer_than_run,
)

Labels = Annotated[list[int], BeforeValidator(one_or_more, json_schema_input_type=int | list[int])]


class Patches(BaseModel):
    model_config = STRICT
    size: Size
    per_case: Positive
    foreground: Fraction


class Augment(IntensityAugment):
    flip: Axes
    mirror_pairs: list[list[Text]]
    rotate: Angles
    zoom: Factors
    stretch: Annotated[float, Field(ge=1)]
    elastic: NotNegative
    low_res: Annotated[float, Field(ge=1)]


class Loss(BaseModel):
    model_config = STRICT
    dice: NotNegative
    ce: NotNegative
    deep_supervision: bool


class Finetune(BaseModel):
    model_config = STRICT
    freeze_epochs: Count
    encoder_lr: AboveZero


class Inference(BaseModel):
    model_config = STRICT
    overlap: Annotated[float, Field(ge=0, le=0.9)]
    batch: Positive
    mirror: Axes
    tolerance: AboveZero


# keys of the config at hand that a test goes by; all others are those of the checkpoint
OF_THE_TEST = (
    "experiment results_dir cache_dir csv_path test_folds test_ckpt allow_seen_patients precision "
    "n_workers inference"
).split()


class SegmentationConfig(FineTuned):
    classes: dict[Text, Labels]
    ignore_labels: Labels
    optimizer: Literal["adamw", "sgd"]
    val_every: Positive
    patches: Patches
    augment: Augment
    loss: Loss
    finetune: Finetune
    inference: Inference


def impossible_segmentation(values: Values, facts_of: FactsOf) -> Wrong:
    """Values of segmentation_config.yaml that contradict each other, or that the backbone cannot
    take."""
    facts = facts_of(values, True)
    yield from impossible_run(values)
    yield from longer_than_run("finetune.freeze_epochs", values)
    yield from impossible_size("patches.size", values, facts)
    if values.get("loss.dice") == values.get("loss.ce") == 0:
        yield "loss.ce", "0, and so is loss.dice: nothing to learn from"
    if values.get("loss.deep_supervision") and facts and len(facts.strides) == 2:
        yield "loss.deep_supervision", "true, but a decoder of one stage has one map only"
    classes = values.get("classes")
    if isinstance(classes, dict) and all(map(_are_labels, classes.values())):
        ignore, pairs = values.get("ignore_labels", []), values.get("augment.mirror_pairs", [])
        yield from class_problems(classes, one_or_more(ignore), pairs)


def _are_labels(value: Any) -> bool:
    """Whether the schema takes it: wrong label values are reported, and get no further."""
    return all(type(x) is int for x in one_or_more(value)) if value is not None else False

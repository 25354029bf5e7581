"""The rules of classification_config.yaml (see `utils.config.schema`)."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, WrapValidator

from utils.config.fields import STRICT, AboveZero, Angles, Axes, Count, Factors, Size, Text, Texts
from utils.config.schema import (
    FOLDS,
    FactsOf,
    FineTuned,
    IntensityAugment,
    Values,
    Wrong,
    impossible_run,
    impossible_size,
    longer_than_run,
)


def all_or_count(value: Any, check: Any) -> Any:
    if isinstance(value, str) and value != "all":
        raise ValueError("expected a number of epochs, or all")
    return value if value == "all" else check(value)


Epochs = Annotated[
    Count,
    WrapValidator(all_or_count, json_schema_input_type=Literal["all"] | Count),
    PlainSerializer(lambda value: value),
]
Shift = Annotated[float, Field(ge=0, le=0.5)]  # of the image's size


class Image(BaseModel):
    model_config = STRICT
    fit: Literal["crop", "resize"]
    size: Size


class Augment(IntensityAugment):
    flip: Axes
    rotate: Angles
    zoom: Factors
    translate: Shift


class Head(BaseModel):
    model_config = STRICT
    pooling: Literal["max", "mean", "meanmax", "gem"]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class Finetune(BaseModel):
    model_config = STRICT
    freeze_epochs: Epochs
    backbone_lr: AboveZero
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    class_weights: bool
    balance: Text | None
    early_stopping: Count


class Test(BaseModel):
    model_config = STRICT
    flip: Axes
    shift: Shift


# keys of the config at hand that a test goes by; all others are those of the checkpoint
OF_THE_TEST = (
    "experiment results_dir cache_dir csv_path test_folds test_ckpt report_by allow_seen_patients "
    "batch_size precision n_workers test"
).split()


class ClassificationConfig(FineTuned):
    cls_targets: Texts
    reg_targets: Texts
    report_by: Texts
    image: Image
    augment: Augment
    head: Head
    finetune: Finetune
    test: Test


def impossible_classification(values: Values, facts_of: FactsOf, cv: bool = False) -> Wrong:
    """Values of classification_config.yaml that contradict each other, or `--cv`, or that the
    backbone cannot take."""
    yield from impossible_run(values)
    yield from _impossible_cv(values) if cv else ()
    classes, numbers = (values.get(key) for key in ("cls_targets", "reg_targets"))
    if classes == [] and numbers == []:
        yield "cls_targets", "empty, and so is reg_targets: nothing to learn"
    for name in set(map(str, classes or [])) & set(map(str, numbers or [])):
        yield "reg_targets", f"{name} is in cls_targets too"
    balance = values.get("finetune.balance")
    if balance is not None and classes is not None and str(balance) not in map(str, classes):
        yield "finetune.balance", f"{balance}: not in cls_targets {classes}"
    if balance is not None and values.get("finetune.class_weights"):
        what = "true, but finetune.balance is set: rare classes would be favoured twice"
        yield "finetune.class_weights", what
    if values.get("finetune.freeze_epochs") != "all":
        yield from longer_than_run("finetune.freeze_epochs", values)
    elif values.get("finetune.layer_decay", 1) != 1 or values.get("finetune.backbone_lr", 1) != 1:
        key = "finetune.layer_decay"
        key = key if values.get(key, 1) != 1 else "finetune.backbone_lr"
        yield key, f"{values[key]}: of no effect with finetune.freeze_epochs all; write 1.0"
    if values.get("finetune.early_stopping") and values.get("val_folds") == [] and not cv:
        yield "finetune.early_stopping", "set, but val_folds is empty"
    size, facts = values.get("image.size"), facts_of(values, False)
    if size is not None and facts is not None:
        stride = facts.strides[-1]
        padded = [-(-n // stride) * stride for n in size]  # as the classifier does
        yield from impossible_size("image.size", {**values, "image.size": padded}, facts)


def _impossible_cv(values: Values) -> Wrong:
    """What a cross-validation has no use for."""
    number = sum(len(values.get(key, [])) for key in FOLDS)
    if number < 3 and all(key in values for key in FOLDS):
        yield "train_folds", f"{number} folds with val_folds and test_folds; --cv needs at least 3"
    if values.get("test_ckpt") is not None:
        yield "test_ckpt", "not together with --cv"
    if values.get("resume_training_from") not in (None, "auto"):
        yield "resume_training_from", "with --cv only null or auto: each fold has its checkpoints"

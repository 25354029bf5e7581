"""The rules of classification_config.yaml (see `utils.config.schema`)."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config import fields as f
from utils.config import schema

Epochs = f.or_word(f.Count, "all", "a number of epochs")
Shift = Annotated[float, Field(ge=0, le=0.5)]  # of the image's size


class Image(f.Section):
    fit: Literal["crop", "resize"]
    size: f.Size


class Augment(schema.IntensityAugment):
    flip: f.Axes
    rotate: f.Angles
    zoom: f.Factors
    translate: Shift


class Head(f.Section):
    pooling: Literal["max", "mean", "meanmax", "gem"]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class Finetune(f.Section):
    freeze_epochs: Epochs
    backbone_lr: f.AboveZero
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    class_weights: bool
    balance: f.Text | None
    early_stopping: f.Count


class Test(f.Section):
    flip: f.Axes
    shift: Shift


# The keys that a test takes from the config at hand; all others come from the checkpoint.
OF_THE_TEST = (
    "experiment results_dir cache_dir csv_path test_folds test_ckpt report_by allow_seen_patients "
    "batch_size precision n_workers test"
).split()


class ClassificationConfig(schema.FineTuned):
    cls_targets: f.Texts
    reg_targets: f.Texts
    report_by: f.Texts
    image: Image
    augment: Augment
    head: Head
    finetune: Finetune
    test: Test


def impossible_classification(
    values: schema.Values, facts_of: schema.FactsOf, cv: bool = False, predicted: str | None = None
) -> schema.Wrong:
    """Find values that contradict each other, --cv or --predict, or that the backbone cannot take.

    cv: whether --cv is given. predicted: the path of --predict, if it is given.
    """
    yield from schema.impossible_run(values, predicted)
    yield from schema.impossible_cv(values, predicted) if cv else ()
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
        yield from schema.impossible_freezing(values)
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
        yield from schema.impossible_size("image.size", {**values, "image.size": padded}, facts)

"""The rules of utils/transfer/study.yaml, a study of weights (see `utils.config.schema`)."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from utils.config import fields as f
from utils.config import schema

EPOCHS = 10  # of every run of a study; the first is the warm-up
# keys of the stage's config that the study sets itself
RESERVED = {*schema.WEIGHTS, "experiment", "results_dir", "allow_seen_patients", "learning_rate"}
RESERVED |= {"n_epochs", "warmup_epochs", "steps_per_epoch", "seed", "finetune.early_stopping"}
DATA = {"csv_path", "train_folds", "val_folds", "test_folds"}  # on which all arms are compared


def whole_epochs(steps: int) -> int:
    if steps % EPOCHS:
        raise ValueError(f"expected a multiple of {EPOCHS}, as every run has {EPOCHS} epochs")
    return steps


def rising(values: list) -> list:
    if any(a >= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError("expected rising values")
    return values


Steps = Annotated[int, Field(ge=1), AfterValidator(whole_epochs)]
Counts = Annotated[list[f.Positive], Field(min_length=1), AfterValidator(rising)]
Rates = Annotated[list[f.AboveZero], Field(min_length=1), AfterValidator(rising)]
Methods = Annotated[
    list[Literal["fine_tune", "probe"]], Field(min_length=1), AfterValidator(f.no_repeats)
]


class Tuning(f.Section):
    learning_rates: Rates
    draws: f.Positive
    label_count: f.Positive | None


class Convergence(f.Section):
    steps: Annotated[list[Steps], AfterValidator(rising)]
    label_count: f.Positive | None


class TransferConfig(f.Section):
    out: f.PathText
    stage: Literal["segmentation", "classification"]
    config: f.PathText
    settings: dict[f.Text, Any]
    arms: dict[f.Text, f.PathText | None]
    permuted: f.Texts
    with_decoder: f.Texts
    arm_settings: dict[f.Text, dict[f.Text, Any]]
    methods: Methods
    label_counts: Counts
    draws: Annotated[int, Field(ge=2)]
    seeds: f.Positive
    seed: f.Count
    steps: Steps
    tuning: Tuning
    convergence: Convergence
    at_once: f.Positive
    keep_files: bool


def impossible_transfer(values: schema.Values) -> schema.Wrong:
    """Find values that contradict each other."""
    arms, counts = values.get("arms"), values.get("label_counts")
    arms = arms if isinstance(arms, dict) else None
    if arms is not None and list(arms.values()).count(None) != 1:
        what = "expected one arm with null, random weights, with which the others are compared"
        yield "arms", what
    elif arms is not None and len(arms) < 2:
        yield "arms", "expected a second arm"
    for name in arms or ():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,39}", name):
            yield "arms", f"{name!r}: expected letters, digits and - (it names folders)"
    for name in values.get("permuted") or () if arms is not None else ():
        if arms.get(name) is None:
            yield "permuted", f"{name}: not an arm with a file"
        elif f"{name}-permuted" in arms:
            yield "permuted", f"{name}: there is an arm {name}-permuted already"
    for name in values.get("with_decoder") or () if arms is not None else ():
        if arms.get(name) is None:
            yield "with_decoder", f"{name}: not an arm with a file"
        elif values.get("stage") != "segmentation":
            yield "with_decoder", "classification has no decoder"
    for key in ("tuning.label_count", "convergence.label_count"):
        if counts and values.get(key) is not None and values[key] not in counts:
            yield key, f"{values[key]}: not among label_counts {counts}"
    own = values.get("arm_settings")
    own = own if isinstance(own, dict) else {}
    for name in own if arms is not None else ():
        if name not in arms:
            yield "arm_settings", f"{name}: not an arm"
    for where, settings in [("settings", values.get("settings"))] + [
        (f"arm_settings.{name}", settings) for name, settings in own.items()
    ]:
        for key in RESERVED & settings.keys() if isinstance(settings, dict) else ():
            yield where, f"{key}: the study sets it"
    for name, settings in own.items():
        for key in DATA & settings.keys() if isinstance(settings, dict) else ():
            yield f"arm_settings.{name}", f"{key}: the same for all arms"

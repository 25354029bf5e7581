"""What the three config files share: sections, their rules, and what is impossible together.

The YAML files hold the defaults, so no field here has one; their comments say what each key means.
Fields check one value each (fields.py). What involves several keys is in the functions at the end,
which see every value that is valid by itself, so that all problems are reported together.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from utils.config.fields import (
    STRICT,
    AboveZero,
    Count,
    Factors,
    Fraction,
    Modality,
    Name,
    NotNegative,
    Paths,
    PathText,
    Percentiles,
    Positive,
    Range,
    Spacing,
    Texts,
    as_text,
)

WEIGHTS = ("suprem_weights", "dino_weights", "resume_training_from", "test_ckpt")
FOLDS = ("train_folds", "val_folds", "test_folds")
Values = Mapping[str, Any]  # {dotted key: valid value}
FactsOf = Callable[[Values, bool], Any]  # `models.backbones.facts_of`
Wrong = Iterator[tuple[str, str]]  # dotted key, what is wrong with it


class ResUNet(BaseModel):
    model_config = STRICT
    features: Annotated[list[Positive], Field(min_length=2)]
    blocks: Annotated[list[Positive], Field(min_length=2)]


class SwinUNETR(BaseModel):
    model_config = STRICT
    feature_size: Annotated[int, Field(ge=12, multiple_of=12)]
    use_v2: bool


class UNet(BaseModel):
    model_config = STRICT
    feature_size: Annotated[int, Field(ge=2, multiple_of=2)]


class SegResNet(BaseModel):
    model_config = STRICT
    variant: Literal["standard", "ds"]
    feature_size: Annotated[int, Field(ge=8, multiple_of=8)] | None
    blocks: Annotated[list[Positive], Field(min_length=2)] | None


class Data(BaseModel):
    model_config = STRICT
    modality: Literal["auto", Modality]
    spacing: Spacing
    hu_window: Range
    percentiles: Percentiles
    crop_background: bool
    max_bad_cases: Count


class Run(BaseModel):
    model_config = STRICT
    experiment: Name
    results_dir: PathText
    cache_dir: PathText
    csv_path: PathText
    train_folds: Texts
    val_folds: Texts
    test_folds: Texts
    suprem_weights: PathText | None
    resume_training_from: PathText | None
    test_ckpt: PathText | None
    backbone: Literal["resunet", "swinunetr", "unet", "segresnet"]
    resunet: ResUNet
    swinunetr: SwinUNETR
    unet: UNet
    segresnet: SegResNet
    grad_checkpointing: bool
    compile: bool
    n_epochs: Positive
    batch_size: Positive
    accumulate: Positive
    learning_rate: AboveZero
    min_learning_rate: NotNegative
    warmup_epochs: Count
    weight_decay: NotNegative
    clip_grad: NotNegative
    precision: Literal["bf16", "fp16", "fp32"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    n_workers: Count
    max_bad_steps: Positive
    data: Data
    log_every: Positive
    save_every: Positive


class IntensityAugment(BaseModel):
    model_config = STRICT
    scale: Fraction
    shift: NotNegative
    gamma: Factors
    noise: NotNegative
    blur: NotNegative
    hu_window: Fraction


class FineTuned(Run):
    """A stage that may start from `dino.py`'s backbone, and tests one checkpoint or several."""

    dino_weights: PathText | None
    test_ckpt: Paths | None
    allow_seen_patients: bool


# ---- what is impossible together
def impossible_run(values: Values) -> Wrong:
    """Two sources of weights, a fold in two parts, a schedule longer than the run."""
    chosen = [key for key in WEIGHTS if values.get(key) is not None]
    if values.get("resume_training_from") == "auto" and values.get("test_ckpt") is None:
        chosen.remove("resume_training_from")  # a requeued run's first start may need weights
    for key in chosen[1:]:
        yield key, f"set, and so is {chosen[0]}: at most one source of weights may be"
    used = {}
    for key in FOLDS:
        for fold in map(as_text, values.get(key, [])):
            if fold in used:
                yield key, f"fold {fold} is in {used[fold]} too"
            used.setdefault(fold, key)
    if values.get("test_ckpt") is None and values.get("train_folds") == []:
        yield "train_folds", "empty: nothing to train on"
    if values.get("test_ckpt") is not None and values.get("test_folds") == []:
        yield "test_folds", "empty, but test_ckpt is set"
    yield from longer_than_run("warmup_epochs", values)
    if values.get("min_learning_rate", 0) > values.get("learning_rate", math.inf):
        yield "min_learning_rate", f"{values['min_learning_rate']}: more than learning_rate"
    features, blocks = values.get("resunet.features"), values.get("resunet.blocks")
    if features and blocks and len(features) != len(blocks):
        what = f"{len(blocks)} stages, but resunet.features has {len(features)}"
        yield "resunet.blocks", what


def longer_than_run(key: str, values: Values) -> Wrong:
    """A number of epochs that is more than n_epochs."""
    if values.get(key, 0) > values.get("n_epochs", math.inf):
        yield key, f"{values[key]}: more than n_epochs {values['n_epochs']}"


def impossible_size(key: str, values: Values, facts, largest: Iterable[int] | None = None) -> Wrong:
    """An input size that the backbone cannot take; the nearest one is at most `largest`.

    facts: of `models.backbones.facts_of`; None where they are not known.
    """
    size = values.get(key)
    if size is None or facts is None:
        return
    stride = facts.strides[-1]
    rounded = [
        max(1, min(math.floor(n / stride + 0.5), m // stride)) * stride
        for n, m in zip(size, largest or [2**31] * 3, strict=True)
    ]
    if any(n % stride for n in size):
        what = f"{size}: must be divisible by {stride} for {values['backbone']}"
        yield key, f"{what}; nearest: {rounded}"
    elif max(size) < facts.min_size:
        what = f"{size}: leaves one voxel at the deepest stage, too little for its normalization"
        yield key, f"{what}; nearest: {[facts.min_size] * 3}"

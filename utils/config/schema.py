"""What the three config files share: their sections, and rules on several keys.

The YAML files hold the defaults, so no field here has one; their comments say what each key means.
A field checks its own value (fields.py). The functions at the end check rules on several keys. They
see every value that is valid by itself, so that all problems are reported together.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from utils.config import fields as f

WEIGHTS = ("suprem_weights", "dino_weights", "resume_training_from", "test_ckpt")
FOLDS = ("train_folds", "val_folds", "test_folds")
# Of the stages that are fine-tuned, beside those of `utils.config.command_line`: {option: meaning}
OPTIONS = {
    "--predict PATH": "with test_ckpt: predict a scan, or all scans below a folder, without a CSV; "
    "to <experiment>/predictions/",
    "--cv": "cross-validate over all folds in train_folds, val_folds and test_folds: each is "
    "tested once, by a run with the next one in the list as val (after the last: the first) "
    "and all others as train; results of all folds in <experiment>/test",
}
Values = Mapping[str, Any]  # {dotted key: valid value}
FactsOf = Callable[[Values, bool], Any]  # the type of `models.backbones.facts_of`
Wrong = Iterator[tuple[str, str]]  # (dotted key, what is wrong with it)


class ResUNet(f.Section):
    features: Annotated[list[f.Positive], Field(min_length=2)]
    blocks: Annotated[list[f.Positive], Field(min_length=2)]


class SwinUNETR(f.Section):
    feature_size: Annotated[int, Field(ge=12, multiple_of=12)]
    use_v2: bool


class UNet(f.Section):
    feature_size: Annotated[int, Field(ge=2, multiple_of=2)]


class SegResNet(f.Section):
    variant: Literal["standard", "ds"]
    feature_size: Annotated[int, Field(ge=8, multiple_of=8)] | None
    blocks: Annotated[list[f.Positive], Field(min_length=2)] | None


class Data(f.Section):
    channels: Annotated[f.Texts, Field(min_length=1)] | None
    missing_channels: Literal["refuse", "zero"]
    modality: f.Modalities
    spacing: f.Spacing
    hu_window: f.Range
    percentiles: f.Percentiles
    crop_background: bool
    uneven_slices: Literal["refuse", "resample"]
    mask_grid: Literal["header", "voxels", "resample"]
    nan_voxels: Literal["refuse", "background"]
    max_bad_cases: f.Count


class Run(f.Section):
    experiment: f.Name
    results_dir: f.PathText
    cache_dir: f.PathText
    csv_path: f.PathText
    train_folds: f.Texts
    val_folds: f.Texts
    test_folds: f.Texts
    suprem_weights: f.PathText | None
    resume_training_from: f.PathText | None
    test_ckpt: f.PathText | None
    backbone: Literal["resunet", "swinunetr", "unet", "segresnet"]
    resunet: ResUNet
    swinunetr: SwinUNETR
    unet: UNet
    segresnet: SegResNet
    grad_checkpointing: bool
    compile: bool
    n_epochs: f.Positive
    batch_size: f.Positive
    accumulate: f.Positive
    learning_rate: f.AboveZero
    min_learning_rate: f.NotNegative
    warmup_epochs: f.Count
    weight_decay: f.NotNegative
    clip_grad: f.NotNegative
    precision: Literal["bf16", "fp16", "fp32"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    n_workers: f.Count
    max_bad_steps: f.Positive
    data: Data
    tracker: Literal["wandb", "mlflow"] | None
    log_every: f.Positive
    save_every: f.Positive


class IntensityAugment(f.Section):
    scale: f.Fraction
    shift: f.NotNegative
    gamma: f.Factors
    noise: f.NotNegative
    blur: f.NotNegative
    hu_window: f.Fraction
    drop_channel: f.Fraction


class FineTuned(Run):
    """A stage that may start from a backbone of `dino.py` and tests one or several checkpoints."""

    dino_weights: f.PathText | None
    test_ckpt: f.Paths | None
    allow_seen_patients: bool
    steps_per_epoch: f.Positive | None

    @property
    def batches_per_epoch(self) -> int | None:
        return self.steps_per_epoch and self.steps_per_epoch * self.accumulate


# ---- what is impossible together
def impossible_run(values: Values, predicted: str | None = None) -> Wrong:
    """Find contradictions in what all stages share: weights, folds, the schedule, the backbone.

    predicted: the path of --predict, if it is given.
    """
    chosen = [key for key in WEIGHTS if values.get(key) is not None]
    if values.get("resume_training_from") == "auto" and values.get("test_ckpt") is None:
        chosen.remove("resume_training_from")  # a requeued run's first start may need weights
    for key in chosen[1:]:
        yield key, f"set, and so is {chosen[0]}: at most one source of weights may be"
    used = {}
    for key in FOLDS:
        for fold in map(f.as_text, values.get(key, [])):
            if fold in used:
                yield key, f"fold {fold} is in {used[fold]} too"
            used.setdefault(fold, key)
    if values.get("test_ckpt") is None and values.get("train_folds") == []:
        yield "train_folds", "empty: nothing to train on"
    if predicted and values.get("test_ckpt", "") is None:
        yield "test_ckpt", "null: --predict needs the checkpoint that predicts"
    if values.get("test_ckpt") is not None and values.get("test_folds") == [] and not predicted:
        yield "test_folds", "empty, but test_ckpt is set"
    tracker = values.get("tracker")
    if tracker and importlib.util.find_spec(tracker) is None:
        yield "tracker", f"{tracker} is not installed: pip install {tracker}"
    yield from longer_than_run("warmup_epochs", values)
    if values.get("min_learning_rate", 0) > values.get("learning_rate", math.inf):
        yield "min_learning_rate", f"{values['min_learning_rate']}: more than learning_rate"
    yield from _impossible_channels(values)
    features, blocks = values.get("resunet.features"), values.get("resunet.blocks")
    if features and blocks and len(features) != len(blocks):
        what = f"{len(blocks)} stages, but resunet.features has {len(features)}"
        yield "resunet.blocks", what


def _impossible_channels(values: Values) -> Wrong:
    """Report what only several channels can have. A test takes the channels of its checkpoint."""
    if "data.channels" not in values or values.get("test_ckpt") is not None:
        return
    channels = values["data.channels"] or []
    shown = f"data.channels is {channels or 'null'}"
    modality = values.get("data.modality")
    if isinstance(modality, list | tuple) and len(modality) != len(channels):
        yield "data.modality", f"{len(modality)} modalities, but {shown}"
    if values.get("data.missing_channels") == "zero" and len(channels) < 2:
        yield "data.missing_channels", f"zero, but {shown}: none can be missing"
    if values.get("augment.drop_channel") and len(channels) < 2:
        yield "augment.drop_channel", f"{values['augment.drop_channel']}, but {shown}"


def impossible_cv(values: Values, predicted: str | None = None) -> Wrong:
    """Find values that a cross-validation cannot use."""
    number = sum(len(values.get(key, [])) for key in FOLDS)
    if number < 3 and all(key in values for key in FOLDS):
        yield "train_folds", f"{number} folds with val_folds and test_folds; --cv needs at least 3"
    if values.get("test_ckpt") is not None:
        yield "test_ckpt", "not together with --cv"
    elif predicted:
        yield "--predict", "not together with --cv"
    if values.get("resume_training_from") not in (None, "auto"):
        yield "resume_training_from", "with --cv only null or auto: each fold has its checkpoints"


def longer_than_run(key: str, values: Values) -> Wrong:
    """Report a number of epochs that is more than n_epochs."""
    if values.get(key, 0) > values.get("n_epochs", math.inf):
        yield key, f"{values[key]}: more than n_epochs {values['n_epochs']}"


def impossible_freezing(values: Values) -> Wrong:
    """Report frozen epochs that leave too few for the second warm-up."""
    key, names = "finetune.freeze_epochs", ("n_epochs", "warmup_epochs")
    yield from longer_than_run(key, values)
    frozen, epochs, warmup = (values.get(name, 0) for name in (key, *names))
    if 0 < frozen < epochs < frozen + warmup:
        left = f"leaves {epochs - frozen} of n_epochs {epochs}"
        yield key, f"{frozen}: {left} for a second warm-up of warmup_epochs {warmup}"


def impossible_size(key: str, values: Values, facts, largest: Iterable[int] | None = None) -> Wrong:
    """Report an input size that the backbone cannot take, with the nearest one up to `largest`.

    facts: what `models.backbones.facts_of` returned; None if they are not known.
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

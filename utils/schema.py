"""The rules of the config files: which keys exist, their types, what is impossible.

The YAML files hold the defaults, so no field here has one; their comments say what each key means.
Fields check one value each. What involves several keys is in the functions at the end, which see
every value that is valid by itself, so that all problems are reported together.
"""

import math
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

from utils.files import expand_path

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
Modality = Literal["CT", "MR", "PT", "NM", "US", "XA", "OT"]  # DICOM (0008,0060) of volumes
WEIGHTS = ("suprem_weights", "dino_weights", "resume_training_from", "test_ckpt")
FOLDS = ("train_folds", "val_folds", "test_folds")
SWINUNETR_STRIDE, SWINUNETR_MAPS = 32, 5  # patch embedding / 2, then four stages to / 32
WINDOWS_DEVICES = r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(\..*)?"


# ---- types of values
def as_text(value: Any) -> Any:
    """Text as it is, a number as text (fold 0 is "0"); true and false are left for an error."""
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
    """A name that is one folder inside results_dir on every system."""
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


def native_or_mm(value: Any, check: Any) -> Any:
    if isinstance(value, str) and value != "native":
        raise ValueError("expected three numbers in mm, or native")
    return value if value == "native" else check(value)


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Angle = Annotated[float, Field(ge=0, le=180)]
Percent = Annotated[float, Field(ge=0, le=100)]
Size = Annotated[tuple[Positive, Positive, Positive], Strict(False)]  # voxels
Text = Annotated[str, BeforeValidator(quoted_if_bool), AfterValidator(not_empty)]
Texts = Annotated[list[Text], AfterValidator(no_repeats)]
PathText = Annotated[Text, AfterValidator(expand_path)]
Name = Annotated[Text, AfterValidator(folder_name)]
Range = Annotated[
    tuple[float, float], Strict(False), AfterValidator(rising), AfterValidator(not_equal)
]
Percentiles = Annotated[
    tuple[Percent, Percent], Strict(False), AfterValidator(rising), AfterValidator(not_equal)
]
Factors = Annotated[tuple[AboveZero, AboveZero], Strict(False), AfterValidator(rising)]
Fractions = Annotated[tuple[Fraction, Fraction], Strict(False), AfterValidator(rising)]
Spacing = Annotated[  # mm, or the word native
    tuple[AboveZero, AboveZero, AboveZero],
    Strict(False),
    WrapValidator(native_or_mm),
    PlainSerializer(lambda value: value),
]


# ---- keys that all three scripts have
class Run(BaseModel):
    model_config = STRICT
    experiment: Name
    results_dir: PathText
    cache_dir: PathText
    csv_path: PathText
    train_folds: Annotated[Texts, Field(min_length=1)]
    val_folds: Texts
    test_folds: Texts
    resume_training_from: PathText | None
    test_ckpt: PathText | None
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
    grad_checkpointing: bool
    compile: bool
    log_every: Positive
    save_every: Positive


class Data(BaseModel):
    model_config = STRICT
    modality: Literal["auto", Modality]
    spacing: Spacing
    hu_window: Range
    percentiles: Percentiles
    crop_background: bool
    max_bad_cases: Count


class ResUNet(BaseModel):
    model_config = STRICT
    features: Annotated[list[Positive], Field(min_length=2)]
    blocks: Annotated[list[Positive], Field(min_length=2)]


class SwinUNETR(BaseModel):
    model_config = STRICT
    feature_size: Annotated[int, Field(ge=12, multiple_of=12)]
    use_v2: bool


# ---- dino_config.yaml
class Crops(BaseModel):
    model_config = STRICT
    region_size: Size
    regions_per_case: Positive
    global_size: Size
    global_zoom: Factors
    num_local: Count
    local_size: Size
    local_zoom: Factors
    aspect: Annotated[float, Field(ge=1)]
    min_body: Fraction


class Augment(BaseModel):
    model_config = STRICT
    flip: Annotated[tuple[bool, bool, bool], Strict(False)]
    rotate: Annotated[tuple[Angle, Angle, Angle], Strict(False)]
    scale: Fraction
    shift: NotNegative
    gamma: Factors
    noise: NotNegative
    blur: NotNegative
    hu_window: Fraction


class Dino(BaseModel):
    model_config = STRICT
    pooling: Literal["max", "mean", "meanmax", "gem"]
    out_dim: Annotated[int, Field(ge=2)]
    head_hidden: Positive
    head_bottleneck: Positive
    head_batchnorm: bool
    norm_last_layer: bool
    freeze_prototypes_epochs: Count
    centering: Literal["center", "sinkhorn"]
    center_momentum: Fraction
    student_temp: AboveZero
    teacher_temp: AboveZero
    teacher_temp_start: AboveZero
    teacher_temp_warmup_epochs: Count
    momentum: Fraction
    koleo_weight: NotNegative
    patch_weight: NotNegative
    patch_level: Count
    patch_out_dim: Annotated[int, Field(ge=2)]
    mask_ratio: Fractions
    mask_prob: Fraction


class Probe(BaseModel):
    model_config = STRICT
    every: Positive
    max_cases: Positive
    dense_cases: Count


class DinoConfig(Run):
    probe_targets: Texts
    backbone: Literal["resunet", "swinunetr"]
    resunet: ResUNet
    swinunetr: SwinUNETR
    weight_decay_end: NotNegative
    data: Data
    crops: Crops
    augment: Augment
    dino: Dino
    probe: Probe


# ---- what is impossible together: {dotted key: valid value} -> [(dotted key, what is wrong)]
def impossible_dino(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values of dino_config.yaml that contradict each other."""
    return [
        *_impossible_run(values),
        *_impossible_backbone(values),
        *_impossible_crops(values),
        *_impossible_schedules(values),
    ]


def _impossible_run(values):
    chosen = [key for key in WEIGHTS if values.get(key) is not None]
    for key in chosen[1:]:
        yield key, f"set, and so is {chosen[0]}: at most one source of weights may be"
    used = {}
    for key in FOLDS:
        for fold in map(as_text, values.get(key, [])):
            if fold in used:
                yield key, f"fold {fold} is in {used[fold]} too"
            used.setdefault(fold, key)
    if values.get("test_ckpt") is not None and values.get("test_folds") == []:
        yield "test_folds", "empty, but test_ckpt is set"


def _impossible_backbone(values):
    features, blocks = values.get("resunet.features"), values.get("resunet.blocks")
    if features and blocks and len(features) != len(blocks):
        what = f"{len(blocks)} stages, but resunet.features has {len(features)}"
        yield "resunet.blocks", what
    _, num_maps = _stride_and_maps(values)
    level = values.get("dino.patch_level")
    if level is not None and num_maps is not None and level >= num_maps:
        what = f"{level}: {values['backbone']} has {num_maps} feature maps; nearest: {num_maps - 1}"
        yield "dino.patch_level", what


def _impossible_crops(values):
    stride, _ = _stride_and_maps(values)
    region = values.get("crops.region_size", [2**31] * 3)
    for key in ("crops.global_size", "crops.local_size"):
        size = values.get(key)
        if size is None or (key == "crops.local_size" and values.get("crops.num_local") == 0):
            continue
        if any(n > m for n, m in zip(size, region, strict=True)):
            yield key, f"{size}: larger than crops.region_size {region}"
        if stride is None:
            continue
        rounded = [
            max(1, min(math.floor(n / stride + 0.5), m // stride)) * stride
            for n, m in zip(size, region, strict=True)
        ]
        if any(n % stride for n in size):
            what = f"{size}: must be divisible by {stride} for {values['backbone']}"
            yield key, f"{what}; nearest: {rounded}"
        elif values["backbone"] == "resunet" and max(size) == stride:
            what = f"{size}: leaves one voxel at the deepest stage, which InstanceNorm cannot take"
            yield key, f"{what}; nearest: {[2 * stride] * 3}"


def _stride_and_maps(values) -> tuple[int | None, int | None]:
    """The backbone's stride and the number of maps `encode` returns; None where not known."""
    if values.get("backbone") == "swinunetr":
        return SWINUNETR_STRIDE, SWINUNETR_MAPS
    if values.get("backbone") == "resunet" and "resunet.features" in values:
        stages = len(values["resunet.features"])
        return 2 ** (stages - 1), stages
    return None, None


def _impossible_schedules(values):
    for key in ("warmup_epochs", "dino.teacher_temp_warmup_epochs"):
        if values.get(key, 0) > values.get("n_epochs", math.inf):
            yield key, f"{values[key]}: more than n_epochs {values['n_epochs']}"
    if values.get("min_learning_rate", 0) > values.get("learning_rate", math.inf):
        yield "min_learning_rate", f"{values['min_learning_rate']}: more than learning_rate"

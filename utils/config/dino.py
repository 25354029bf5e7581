"""The rules of dino_config.yaml (see `utils.config.schema`)."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from utils.config.fields import (
    STRICT,
    AboveZero,
    Angles,
    Axes,
    Count,
    Factors,
    Fraction,
    Fractions,
    NotNegative,
    Positive,
    Size,
    Texts,
)
from utils.config.schema import (
    FactsOf,
    IntensityAugment,
    Run,
    Values,
    Wrong,
    impossible_run,
    impossible_size,
    longer_than_run,
)


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


class Augment(IntensityAugment):
    flip: Axes
    rotate: Angles


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
    weight_decay_end: NotNegative
    crops: Crops
    augment: Augment
    dino: Dino
    probe: Probe


def impossible_dino(values: Values, facts_of: FactsOf) -> Wrong:
    """Values of dino_config.yaml that contradict each other, or that the backbone cannot take."""
    yield from impossible_run(values)
    yield from longer_than_run("dino.teacher_temp_warmup_epochs", values)
    level, facts = values.get("dino.patch_level"), facts_of(values, False)
    if level is not None and facts is not None and level >= (num := len(facts.strides)):
        what = f"{level}: {values['backbone']} has {num} feature maps; nearest: {num - 1}"
        yield "dino.patch_level", what
    region = values.get("crops.region_size", [2**31] * 3)
    for key in ("crops.global_size", "crops.local_size"):
        size = values.get(key)
        if size is None or (key == "crops.local_size" and values.get("crops.num_local") == 0):
            continue
        if any(n > m for n, m in zip(size, region, strict=True)):
            yield key, f"{size}: larger than crops.region_size {region}"
        yield from impossible_size(key, values, facts, region)

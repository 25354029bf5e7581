"""The rules of dino_config.yaml (see `utils.config.schema`)."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config import fields as f
from utils.config import schema


class Crops(f.Section):
    region_size: f.Size
    regions_per_case: f.Positive
    global_size: f.Size
    global_zoom: f.Factors
    num_local: f.Count
    local_size: f.Size
    local_zoom: f.Factors
    aspect: Annotated[float, Field(ge=1)]
    min_body: f.Fraction
    pairs: Literal["same_scan", "same_patient"]


class Augment(schema.IntensityAugment):
    flip: f.Axes
    rotate: f.Angles


class Dino(f.Section):
    pooling: Literal["max", "mean", "meanmax", "gem"]
    out_dim: Annotated[int, Field(ge=2)]
    head_hidden: f.Positive
    head_bottleneck: f.Positive
    head_batchnorm: bool
    norm_last_layer: bool
    freeze_prototypes_epochs: f.Count
    centering: Literal["center", "sinkhorn"]
    center_momentum: f.Fraction
    student_temp: f.AboveZero
    teacher_temp: f.AboveZero
    teacher_temp_start: f.AboveZero
    teacher_temp_warmup_epochs: f.Count
    momentum: f.Fraction
    dino_weight: f.NotNegative
    koleo_weight: f.NotNegative
    recon_weight: f.NotNegative
    patch_weight: f.NotNegative
    patch_level: f.Count
    patch_out_dim: Annotated[int, Field(ge=2)]
    mask_ratio: f.Fractions
    mask_prob: f.Fraction


class Probe(f.Section):
    every: f.Positive
    choose: bool
    max_cases: f.Positive
    dense_cases: f.Count


class DinoConfig(schema.Run):
    probe_targets: f.Texts
    weight_decay_end: f.NotNegative
    crops: Crops
    augment: Augment
    dino: Dino
    probe: Probe


def impossible_dino(values: schema.Values, facts_of: schema.FactsOf) -> schema.Wrong:
    """Find values that contradict each other or that the backbone cannot take."""
    yield from schema.impossible_run(values)
    yield from schema.longer_than_run("dino.teacher_temp_warmup_epochs", values)
    weights = [values.get(f"dino.{name}_weight", 1) for name in ("dino", "patch", "recon")]
    hidden = values.get("dino.mask_prob", 1) and any(values.get("dino.mask_ratio", [1]))
    if not any(weights):
        yield "dino.dino_weight", "0, as are patch_weight and recon_weight: nothing to learn from"
    elif not (weights[0] or hidden):
        what = "0, and mask_prob or mask_ratio hides nothing: nothing to learn from"
        yield "dino.dino_weight", what
    if values.get("probe.choose") and values.get("val_folds") == []:
        yield "probe.choose", "true: it chooses by scores of val_folds, which is empty"
    level, facts = values.get("dino.patch_level"), facts_of(values, False)
    decoded = facts_of(values, True) if values.get("dino.recon_weight") else facts
    if level is not None and facts is not None and level >= (num := len(facts.strides)):
        what = f"{level}: {values['backbone']} has {num} feature maps; nearest: {num - 1}"
        yield "dino.patch_level", what
    num_local = values.get("crops.num_local")
    if values.get("crops.pairs") == "same_patient" and num_local and num_local % 2:
        what = f"{num_local}: two scans share them (crops.pairs); nearest: {num_local + 1}"
        yield "crops.num_local", what
    region = values.get("crops.region_size", [2**31] * 3)
    for key in ("crops.global_size", "crops.local_size"):
        size = values.get(key)
        if size is None or (key == "crops.local_size" and values.get("crops.num_local") == 0):
            continue
        if any(n > m for n, m in zip(size, region, strict=True)):
            yield key, f"{size}: larger than crops.region_size {region}"
        needed = decoded if key == "crops.global_size" else facts  # what is decoded
        yield from schema.impossible_size(key, values, needed, region)

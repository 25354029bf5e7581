"""What --check says of the train cases, and the settings that it proposes."""

import json
import os
from types import SimpleNamespace as Space

import nibabel as nib
import numpy as np
import pytest

from data.cache import VolumeCache
from data.cases import Case
from data.prepare.check import check_volumes, looks
from data.prepare.describe import (
    Window,
    describe_train,
    fingerprint_lines,
    padding,
    padding_warnings,
    warnings,
)
from data.prepare.propose import settings_for, settings_lines, target_spacing, window_for
from data.standard import StandardForm
from utils.cost import Cost

COST = Cost(parameters=100_000_000, stride=32, flops=700_000.0, kept=500.0)


def fact(spacing=(1.0, 1.0, 1.0), size=(35.0, 50.0, 36.0), labels=(), volumes=()):
    """Of a CT of this size in mm."""
    look = {"modality": ["CT"], "kind": ["CT"], "spacing": list(spacing), "size": list(size)}
    look["intensity"] = [[-100.0, 40.0, 200.0]]
    return {"look": look, "labels": list(labels), "volumes": list(volumes)}


def config(patch=(96, 96, 96), **more):
    net = Space(features=[32, 64, 128, 256, 320, 320], blocks=[1, 3, 4, 6, 6, 6])
    values = dict(backbone="resunet", resunet=net, suprem_weights=None, dino_weights=None)
    values |= dict(precision="bf16", grad_checkpointing=False, n_epochs=300, batch_size=2)
    values |= dict(classes={"liver": 1, "rest": [2, 3]}, ignore_labels=[], accumulate=1)
    values |= dict(data=Space(spacing=(1.5, 1.5, 1.5)), patches=Space(size=patch, per_case=4))
    return Space(**(values | more))


def test_spacing_is_that_of_nnunet():
    alike = [fact((0.8, 0.8, mm), (400, 400, 400)) for mm in (1, 1.2, 3)]
    assert target_spacing(alike)[0] == [0.8, 0.8, 1.2]
    thick = [fact((0.7, 0.7, mm), (220, 220, 110)) for mm in (4, 5, 5, 6, 6)]
    assert target_spacing(thick)[0] == [0.7, 0.7, np.percentile([4, 5, 5, 6, 6], 10)]
    many = [fact((0.7, 0.7, 5), (140, 140, 900))]  # thick, but not few
    assert target_spacing(many)[0] == [0.7, 0.7, 5]


def test_a_window_is_about_the_median_volume():
    assert window_for(np.array([35, 50, 36]), 8, 1e9) == [40, 56, 40]  # nnU-Net's, hippocampus
    for most in (1e7, 2e6, 1e5):
        size = window_for(np.array([300, 250, 90]), 16, most)
        assert np.prod(size) <= most and not np.any(np.remainder(size, 16))
        assert size[0] >= size[1] >= size[2]
    assert window_for(np.array([300, 250, 90]), 32, 10) == [32, 32, 32]


def test_padding_is_what_no_place_of_the_window_avoids():
    sizes = np.array([[48, 96, 200], [48, 96, 96], [300, 300, 300]])
    assert padding(sizes, Window("patches.size", (96, 96, 96))) == 0.5
    assert padding(sizes, Window("crops.local_size", (96, 96, 96), zoom=0.5)) == 0


def test_no_more_workers_than_cores_are_proposed():
    known, cores = ([fact()] * 9, 9, COST, None), os.cpu_count()
    assert f"  n_workers={cores} " in settings_lines(config(n_workers=cores + 1), *known)[-2]
    assert "n_workers" not in str(settings_lines(config(n_workers=cores), *known))


def test_the_last_line_is_a_command_with_all_of_them():
    given = ["--check", "csv_path=my.csv", "batch_size=9", "classes={liver: 1}"]
    *_, last = settings_lines(config(n_workers=0), [fact()], 9, COST, None, given)
    assert last.startswith("  python segmentation.py csv_path=my.csv 'classes={liver: 1}' data.sp")
    assert last.endswith(" resunet.blocks=[1,3,4,6] patches.size=[40,56,40] batch_size=2")


def test_settings_have_a_reason_and_fit_the_device():
    facts = [fact(spacing=(1, 1, 1))] * 3
    found = dict(settings_for(config(), facts, 200, COST, None))
    assert list(found) == [
        "data.spacing=[1,1,1]",
        "resunet.features=[32,64,128,256] resunet.blocks=[1,3,4,6]",
        "patches.size=[40,56,40]",
        "batch_size=2",
    ]
    assert all(found.values())
    # 2 bytes a number, 30 % more, of 80 % of 24 GB without 16 bytes a parameter
    big = [fact(size=(400, 400, 400))] * 3
    *_, (patch, why), (batch, _) = settings_for(config(), big, 200, COST, 24e9)
    size = json.loads(patch.removeprefix("patches.size="))
    room = (0.8 * 24e9 - 16e8) / (500 * 2 * 1.3)
    assert np.prod(size) * 2 <= room < np.prod(np.add(size, 32)) * 2 and "memory" in why
    assert batch == f"batch_size={int(room / np.prod(size))}"
    few = dict(settings_for(config(), facts, 200, COST, 80e9))
    assert "batch_size=7" in few  # 5 % of 200 x 35 x 50 x 36 voxels, in patches of 40 x 56 x 40


def test_crops_are_no_larger_than_the_volumes():
    views = crops_config(region_size=(128, 128, 128))
    views.dino.recon_weight, views.crops.regions_per_case = 10.0, 4
    cfg = config(crops=views.crops, dino=views.dino)
    del cfg.patches, cfg.classes
    found = dict(settings_for(cfg, [fact()] * 3, 200, COST, None))
    assert {"crops.global_size=[32,48,32]", "crops.local_size=[32,48,32]"} <= found.keys()
    small = dict(settings_for(cfg, [fact(size=(10, 10, 10))] * 3, 200, COST, None))
    assert "crops.global_size=[12,12,12]" in small  # 3 voxels in the deepest map


def test_with_weights_spacing_and_network_stay():
    found = settings_for(config(dino_weights="backbone.pt"), [fact()], 9, COST, None)
    assert [text.split("=")[0] for text, _ in found] == ["patches.size", "batch_size"]


def test_what_is_warned_of():
    padded, slow = warnings(config(), [fact()] * 3, 100, COST, on_cpu=True)
    assert "would be padding: the volumes are far smaller and lie in its middle" in padded
    assert "100 M parameters on a CPU: with the settings as they are 300 epochs" in slow
    assert "days" in slow
    large = [fact(size=(400, 400, 400))]
    assert warnings(config(), large, 100, COST, on_cpu=False) == []
    small = Cost(10_000, 8, 2000.0, 10.0)
    assert warnings(config(n_epochs=2), large, 4, small, on_cpu=True) == []


def test_the_fingerprint_shows_sizes_values_and_classes():
    facts = [fact(labels=[1, 2, 3], volumes=[1500.0, 1.0, 2.0]), fact(labels=[1], volumes=[1300])]
    text = "\n".join(fingerprint_lines(config(), facts, 2))
    for said in (
        "23.0 x 33.0 x 24.0".replace(".0", ""),
        "CT",
        "below -100, 40, 200 HU",
        "1400 (1310 to 1490) mL, in 2 of 2 masks",
        "3 mL, in 1 of 2 masks",
        "98% of 96 x 96 x 96 is padding",
    ):
        assert said in text, text


def crops_config(**sizes):
    sizes = {"global_size": (96, 96, 96), "local_size": (48, 48, 48)} | sizes
    crops = Space(**sizes, local_zoom=(0.3, 0.7), num_local=2)
    return Space(data=Space(spacing=(1.5, 1.5, 1.5)), crops=crops, dino=Space(dino_weight=1.0))


def test_crops_are_not_padded_but_stretched():
    """As `data.views.crops` cuts them."""
    (warning,) = padding_warnings(crops_config(), [fact()] * 3)
    assert "crops.global_size: 98% of 96 x 96 x 96 would lie beyond the volumes" in warning
    assert "stretched to fill it" in warning and "padding" not in warning
    assert padding_warnings(crops_config(global_size=(24, 32, 24)), [fact()] * 3) == []


def test_log_and_report_of_a_training_say_the_same(monkeypatch):
    facts = [fact(labels=[1], volumes=[1300.0]), fact(labels=[2], volumes=[2.0])]
    given = []
    monkeypatch.setattr(
        "data.prepare.describe.look_in_cache",
        lambda case, cache, masks: given.append(masks) or facts[case],
    )
    run = Space(cfg=config())
    found = describe_train(run, [0, 1], None)
    assert found["cases"] == 2 and found["modality"] == [["CT"]] and given == [True, True]
    assert [name for name, _ in run.described] == ["size, voxels", "liver", "rest", "patches.size"]
    text = "\n".join(fingerprint_lines(config(), facts, 2))
    assert all(what in text for _, what in run.described)
    assert run.advised == [w for w in warnings(config(), facts, 2, COST, on_cpu=False)] != []
    run = Space(cfg=crops_config())
    describe_train(run, [0, 1], None)
    assert given[2:] == [False, False] and "liver" not in dict(run.described)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_scan_and_its_cached_volume_have_one_look(tmp_path, modality):
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (80, 64, 40)], indexing="ij"))
    body = (grid**2).sum(0) < 0.7
    voxels = np.where(body, rng.normal(300, 30, body.shape), rng.normal(-1000, 5, body.shape))
    voxels = voxels + (1000 if modality == "MR" else 0)
    affine = np.diag([-1.0, 1, 2, 1])[[1, 0, 2, 3]]  # x and y trade places, x is turned round
    paths = [str(tmp_path / name) for name in ("a.nii.gz", "m.nii.gz")]
    for path, x in zip(paths, (voxels, body * 3), strict=True):
        nib.save(nib.Nifti1Image(x.astype(np.int16), affine), path)
    case = Case("p", paths[0], "0", 2, modality=modality, seg_path=paths[1])
    found = []
    for build, name in ((False, "one"), (True, "two")):
        cache = VolumeCache(tmp_path / name, StandardForm(None))
        assert check_volumes([case], cache, build, 0, "auto", progress=False) == []
        found += looks([case], cache)
    read, cached = found
    assert read["labels"] == cached["labels"] == [3]
    assert read["volumes"] == pytest.approx(cached["volumes"], rel=1e-4)
    assert read["volumes"] == pytest.approx([body.sum() * 2 / 1000], rel=1e-4)
    one, two = read["look"], cached["look"]
    assert {k: one[k] for k in ("modality", "kind", "spacing")} == {
        k: two[k] for k in ("modality", "kind", "spacing")
    }
    assert one["size"] == pytest.approx(two["size"], abs=8)  # a block of 4 voxels
    assert np.ravel(one["intensity"]) == pytest.approx(
        np.ravel(two["intensity"]), abs=20 if modality == "CT" else 0.1
    )

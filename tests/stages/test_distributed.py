"""Two processes (CPU, gloo) train as one with twice the batch, and test what it tests."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import CANARY, equal, read_cases
from tests.places import ROOT
from tests.stages import small
from tests.stages.small import STAGES, steps

COMMON = {  # a center that follows few samples closely magnifies rounding: 1e-7 at step 0 to 6e-4
    "dino": "crops.regions_per_case=2 learning_rate=0.02 probe.every=5 dino.center_momentum=0.99",
    "classification": "head.dropout=0.0 learning_rate=0.0005",
    "segmentation": "learning_rate=0.01",
}
WAYS = {  # batch size per process, other settings
    "dino": {  # 16 regions per epoch
        "plain": (2, ""),
        "sinkhorn": (2, "dino.centering=sinkhorn dino.koleo_weight=0.1"),
        "accumulate": (2, "accumulate=2 dino.pooling=max"),
        "no batchnorm": (2, "dino.head_batchnorm=false dino.patch_weight=0"),
        # KoLeo off: its gradient, 1 / distance, magnifies rounding where two samples are all
        "one each": (1, "dino.mask_prob=0.3 dino.koleo_weight=0"),
    },
    "classification": {  # 8 train cases, of which some lack a label
        "plain": (2, "finetune.class_weights=true"),
        "one each": (1, "accumulate=2 finetune.label_smoothing=0.1"),
        "frozen": (2, "finetune.freeze_epochs=1 finetune.balance=size"),
        "odd": (3, "backbone=segresnet segresnet.blocks=[1,1]"),
    },
    "segmentation": {  # 8 or 16 patches per epoch
        "plain": (1, ""),
        "accumulate": (
            *(2, "accumulate=2 patches.per_case=2 classes={ball: 300, shell: 7} ignore_labels=[9]"),
        ),
        "deep": (1, "loss.deep_supervision=true finetune.freeze_epochs=1 steps_per_epoch=5"),
        "unet": (1, "backbone=unet unet.feature_size=4"),  # statistics of the batch
        "ds": (1, small.DS),  # BatchNorm: statistics of a rank's batch, running ones of both ranks
    },
}
STOPPED = {"dino": "plain", "classification": "plain", "segmentation": "ds"}  # one of the ways
DISTURBED = {"dino": 5, "classification": 2, "segmentation": 2}  # the step, in rank 1
PATIENTS = {"dino": 4, "classification": 4, "segmentation": 2}  # of a step in both ranks
STEP = {  # relative tolerances of the numbers of a step
    "dino": dict.fromkeys(("loss", "dino_loss", "patch_loss", "recon_loss"), 1e-4)
    | {"koleo_loss": 1e-4, "grad_norm": 5e-4}  # BatchNorm of two samples magnifies rounding
    | dict.fromkeys(("teacher_entropy", "target_usage", "center_norm", "feature_std"), 1e-3),
    "classification": dict.fromkeys(("loss", *(f"train_{n}_loss" for n in small.TARGETS)), 1e-3)
    | {"grad_norm": 1e-2},
    "segmentation": dict.fromkeys(("loss", "dice_loss", "ce_loss", "grad_norm"), 1e-4),
}
EPOCH = {  # columns of metrics.csv, and their tolerance
    "dino": ("val_dino_loss", "val_feature_std", "probe_lesion_linear_auc"),
    "classification": ("val_loss", *(f"val_{name}_loss" for name in small.TARGETS)),
    "segmentation": ("val_dice", "val_ball_dice"),
}
WITHIN = dict.fromkeys(STAGES, {"rel": 1e-3, "nan_ok": True}) | {"segmentation": {"abs": 5e-3}}
EACH = pytest.mark.parametrize("stage", STAGES)


def settings(stage: str, way: str, num_processes: int = 1) -> str:
    """Those of one process that does what num_processes do."""
    batch_size, others = WAYS[stage][way]
    return f"{COMMON[stage]} {others} batch_size={batch_size * num_processes}"


def jobs_of(stage: str, results: Path) -> list[tuple]:
    """What two processes do: see two_processes.py."""
    step, stopped = DISTURBED[stage], f"experiment=stopped {settings(stage, STOPPED[stage])}"
    jobs = [("", 0, 0, f"experiment={n} {settings(stage, n)}") for n in WAYS[stage]]
    jobs.append(("spoil", step, 0, f"experiment=spoiled {settings(stage, 'plain')}"))
    jobs.append(("stop", step, small.STOPPED, stopped))
    jobs.append(("", 0, 0, f"{stopped} resume_training_from=auto"))
    if stage != "dino":  # which tests in one process only
        best = results / "plain" / "checkpoints" / "best.pt"
        jobs.append(("", 0, 0, f"experiment=plain test_ckpt={best}"))
    return jobs


@pytest.fixture(scope="module")
def two_of(scans_of, tmp_path_factory):
    """{stage: folder of the runs in two processes}, which are started once for all stages: starting
    takes longer than running."""
    folders = {stage: tmp_path_factory.mktemp(f"two-{stage}") for stage in STAGES}
    todo = [(s, str(scans_of(s)), str(folder), jobs_of(s, folder)) for s, folder in folders.items()]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.stages.two_processes", json.dumps(todo)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "FutureWarning" not in done.stderr, "text of a library reaches the user"
    return folders


@pytest.fixture
def two(stage, two_of):
    return two_of[stage]


@pytest.mark.parametrize(
    ("stage", "way"), [(stage, way) for stage in WAYS for way in WAYS[stage] if way != "ds"]
)
def test_as_one_process_with_twice_the_batch(stage, way, two, run, folder):
    assert run(settings(stage, way, num_processes=2)) == 0
    expected, found = steps(folder), steps(two / way)
    assert len(expected) == len(found) >= (2 if stage == "classification" else 4)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and one["lr"] == other["lr"]
        assert STEP[stage].keys() - one.keys() <= {"patch_loss", "koleo_loss"}  # may be off
        for number, rel in STEP[stage].items():
            if number in one:
                assert other[number] == pytest.approx(one[number], rel=rel), number
    rows = [read_cases(folder / "metrics.csv") for folder in (folder, two / way)]
    for one, other in zip(*rows, strict=True):
        one, other = ({c: float(row[c] or "nan") for c in EPOCH[stage]} for row in (one, other))
        assert other == pytest.approx(one, **WITHIN[stage])


@EACH
def test_a_bad_batch_on_one_rank_is_skipped_on_both(stage, two):
    plain, spoiled, bad = steps(two / "plain"), steps(two / "spoiled"), DISTURBED[stage]
    assert equal(plain[:bad], spoiled[:bad])
    assert [line["loss"] is None for line in spoiled] == [i == bad for i in range(len(spoiled))]
    plain, spoiled = small.log_of(two / "plain"), small.log_of(two / "spoiled")
    line = next(line for line in spoiled.splitlines() if f"step {bad} skipped" in line)
    assert line.count(CANARY) == spoiled.count(CANARY) - plain.count(CANARY) == PATIENTS[stage]


@EACH
def test_a_signal_to_one_rank_stops_both_and_nothing_is_lost(stage, two):
    assert equal(small.result(two / "stopped"), small.result(two / STOPPED[stage]))
    assert f"SIGTERM: saved at step {DISTURBED[stage] + 1}" in small.log_of(two / "stopped")
    assert len(small.load(two / "stopped")["rng"]) == 2


@pytest.mark.parametrize("stage", ["classification", "segmentation"])
def test_a_test_is_split_over_processes(stage, two, run, folder):
    assert run(f"test_ckpt={two / 'plain' / 'checkpoints' / 'best.pt'}") == 0
    one, other = folder / "test", two / "plain" / "test"
    if stage == "classification":
        tables = (pd.read_csv(folder / "predictions.csv") for folder in (one, other))
        pd.testing.assert_frame_equal(*tables, rtol=1e-4)
        return
    assert read_cases(one / "cases.csv") == read_cases(other / "cases.csv")
    assert (one / "summary.json").read_text() == (other / "summary.json").read_text()
    files = sorted(p.name for p in (one / "predictions").iterdir())
    assert files == sorted(p.name for p in (other / "predictions").iterdir()) and len(files) == 3

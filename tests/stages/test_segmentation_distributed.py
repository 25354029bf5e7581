"""Two processes (CPU, gloo) train as one with twice the batch, and test what it tests."""

import json
import subprocess
import sys

import pytest

from tests.conftest import CANARY, ROOT, equal, read_cases
from tests.stages import small_segmentation as small
from tests.stages.test_segmentation_resume import result
from utils import checkpoint
from utils.training import loop

WAYS = {  # per process; 8 or 16 patches per epoch
    "plain": ("batch_size=1",),
    "accumulate": (
        *("batch_size=2", "accumulate=2", "patches.per_case=2"),
        *("classes={ball: 300, shell: 7}", "ignore_labels=[9]"),
    ),
    "deep": ("batch_size=1", "loss.deep_supervision=true", "finetune.freeze_epochs=1"),
    "unet": ("batch_size=1", "backbone=unet", "unet.feature_size=4"),  # statistics of the batch
}
COMMON = ("learning_rate=0.01",)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return small.make_scans(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def two(masked, tmp_path_factory):
    """Folder of the runs in two processes, started once: starting takes longer than running."""
    results = tmp_path_factory.mktemp("two")
    stopped = loop.EXIT_STOPPED
    ds = ("backbone=segresnet", "segresnet.variant=ds", "segresnet.feature_size=8")
    ds += ("segresnet.blocks=[1,1,1]", "batch_size=1", "resume_training_from=auto")
    runs = [("", 0, name, way) for name, way in WAYS.items()]
    runs += [
        ("spoil", 0, "spoiled", ("batch_size=1",)),
        ("", 0, "ds", ds),  # BatchNorm: running statistics of two ranks
        ("stop", stopped, "stopped", ds),
        ("", 0, "stopped", ds),
        ("", 0, "plain", (f"test_ckpt={results / 'plain' / 'checkpoints' / 'best.pt'}",)),
    ]
    jobs = [
        (change, code, small.command_line(masked, results, f"experiment={name}", *COMMON, *way))
        for change, code, name, way in runs
    ]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.stages.two_segmenters", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return results


def steps(experiment):
    lines = (experiment / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", WAYS)
def test_as_one_process_with_twice_the_batch(name, two, masked, tmp_path):
    batch, *others = WAYS[name]
    batch = f"batch_size={2 * int(batch[-1])}"
    assert small.run(masked, tmp_path, "experiment=x", *COMMON, batch, *others) == 0
    expected, found = steps(tmp_path / "x"), steps(two / name)
    assert len(expected) == len(found) >= 4
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and one["lr"] == other["lr"]
        for number in ("loss", "dice_loss", "ce_loss", "grad_norm"):
            assert other[number] == pytest.approx(one[number], rel=1e-4), number
    rows = [read_cases(folder / "metrics.csv") for folder in (tmp_path / "x", two / name)]
    for one, other in zip(*rows, strict=True):
        for column in ("val_dice", "val_ball_dice"):
            assert float(other[column]) == pytest.approx(float(one[column]), abs=5e-3)


def test_a_bad_batch_on_one_rank_is_skipped_on_both(two):
    plain, spoiled = steps(two / "plain"), steps(two / "spoiled")
    assert equal(plain[:2], spoiled[:2])
    assert [line["loss"] is None for line in spoiled] == [i == 2 for i in range(len(spoiled))]
    log = (two / "spoiled" / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "step 2 skipped" in line)
    assert line.count(CANARY) == 2  # one case of each rank


def test_a_signal_to_one_rank_stops_both_and_nothing_is_lost(two):
    assert "SIGTERM: saved at step 3" in (two / "stopped" / "log.txt").read_text()
    assert equal(result(two / "stopped"), result(two / "ds"))
    assert len(checkpoint.load(two / "stopped" / "checkpoints" / "last.pt")["rng"]) == 2


def test_a_test_is_split_over_processes(two, masked, tmp_path):
    best = two / "plain" / "checkpoints" / "best.pt"
    assert small.run(masked, tmp_path, "experiment=x", f"test_ckpt={best}") == 0
    one, other = tmp_path / "x" / "test", two / "plain" / "test"
    assert read_cases(one / "cases.csv") == read_cases(other / "cases.csv")
    assert (one / "summary.json").read_text() == (other / "summary.json").read_text()
    files = sorted(p.name for p in (one / "predictions").iterdir())
    assert files == sorted(p.name for p in (other / "predictions").iterdir()) and len(files) == 3

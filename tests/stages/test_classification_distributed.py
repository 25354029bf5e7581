"""Two processes (CPU, gloo) fine-tune and test as one with twice the batch."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from tests.conftest import CANARY, ROOT, equal, read_cases, without_times
from tests.stages import small_classification as small
from utils import checkpoint
from utils.training import loop

COMMON = ("head.dropout=0.0", "learning_rate=0.0005")
WAYS = {  # 8 train cases, of which some lack a label
    "plain": ("batch_size=2", "finetune.class_weights=true"),
    "one each": ("batch_size=1", "accumulate=2", "finetune.label_smoothing=0.1"),
    "frozen": ("batch_size=2", "finetune.freeze_epochs=1", "finetune.balance=size"),
    "odd": ("batch_size=3", "backbone=segresnet", "segresnet.blocks=[1,1]"),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return small.make_scans(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def two(labelled, tmp_path_factory):
    """Folder of the runs in two processes, started once: starting takes longer than running."""
    results = tmp_path_factory.mktemp("two")
    best = results / "plain" / "checkpoints" / "best.pt"
    runs = [("", 0, name, settings) for name, settings in WAYS.items()]
    runs += [
        ("", 0, "plain", (f"test_ckpt={best}", "batch_size=2")),
        ("spoil", 0, "spoiled", WAYS["plain"]),
        ("stop", loop.EXIT_STOPPED, "stopped", WAYS["plain"]),
        ("", 0, "stopped", (*WAYS["plain"], "resume_training_from=auto")),
    ]
    jobs = [
        (change, code, small.command_line(labelled, results, f"experiment={name}", *COMMON, *ways))
        for change, code, name, ways in runs
    ]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.stages.two_classifiers", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return results


def steps(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", WAYS)
def test_as_one_process_with_twice_the_batch(name, two, labelled, tmp_path):
    batch, *others = WAYS[name]
    batch = f"batch_size={2 * int(batch[-1])}"
    assert small.run(labelled, tmp_path, "experiment=x", *COMMON, batch, *others) == 0
    expected, found = steps(tmp_path / "x"), steps(two / name)
    assert len(expected) == len(found) >= 2
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for number in one:
            if one[number] is None:
                assert other[number] is None
            else:
                rel = 1e-2 if number == "grad_norm" else 1e-3
                assert other[number] == pytest.approx(one[number], rel=rel), number
    rows = [pd.read_csv(folder / "metrics.csv") for folder in (tmp_path / "x", two / name)]
    columns = [c for c in rows[0] if c.startswith("val_") and c.endswith("_loss")]
    pd.testing.assert_frame_equal(rows[0][columns], rows[1][columns], rtol=1e-3)


def test_a_test_in_two_processes_is_that_in_one(two, labelled, tmp_path):
    ckpt = f"test_ckpt={two / 'plain' / 'checkpoints' / 'best.pt'}"
    assert small.run(labelled, tmp_path, "experiment=x", ckpt) == 0
    one, other = (
        pd.read_csv(folder / "test" / "predictions.csv")
        for folder in (tmp_path / "x", two / "plain")
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-4)


def test_a_bad_batch_on_one_rank_is_skipped_on_both(two):
    plain, spoiled = steps(two / "plain"), steps(two / "spoiled")
    assert equal(plain[:2], spoiled[:2])
    assert [line["loss"] is None for line in spoiled] == [i == 2 for i in range(len(spoiled))]
    log = (two / "spoiled" / "log.txt").read_text()
    assert "step 2 skipped" in log and log.count(CANARY) == 4  # two cases of each rank


def test_a_signal_to_one_rank_stops_both_and_nothing_is_lost(two):
    rows = [
        [without_times(row) for row in read_cases(two / name / "metrics.csv")]
        for name in ("plain", "stopped")
    ]
    assert rows[0] == rows[1] and steps(two / "plain") == steps(two / "stopped")
    last = [checkpoint.load(two / n / "checkpoints" / "last.pt") for n in ("plain", "stopped")]
    assert equal(last[0]["modules"], last[1]["modules"]) and len(last[1]["rng"]) == 2
    assert "SIGTERM: saved at step 3" in (two / "stopped" / "log.txt").read_text()

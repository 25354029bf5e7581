"""Two processes (CPU, gloo) train as one with twice the batch."""

import json
import subprocess
import sys

import pytest

from tests.conftest import CANARY, ROOT, equal, read_cases, result
from utils import checkpoint
from utils.training import loop

WAYS = {  # per process; 16 regions per epoch
    "plain": ("batch_size=2",),
    "sinkhorn": ("batch_size=2", "dino.centering=sinkhorn", "dino.koleo_weight=0.1"),
    "accumulate": ("batch_size=2", "accumulate=2", "dino.pooling=max"),
    "no batchnorm": ("batch_size=2", "dino.head_batchnorm=false", "dino.patch_weight=0"),
    # KoLeo off: its gradient, 1 / distance, magnifies rounding where two samples are all there are
    "one each": ("batch_size=1", "dino.mask_prob=0.3", "dino.koleo_weight=0"),
}
COMMON = ("crops.regions_per_case=2", "learning_rate=0.02", "probe.every=5")
TOLERANCE = dict.fromkeys(("loss", "dino_loss", "patch_loss", "koleo_loss", "grad_norm"), 1e-4)
TOLERANCE |= dict.fromkeys(("teacher_entropy", "target_usage", "center_norm", "feature_std"), 1e-3)


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """Folder of the runs in two processes, started once: starting takes longer than running."""
    results = tmp_path_factory.mktemp("two")
    runs = [("", 0, name, settings) for name, settings in WAYS.items()]
    runs += [
        ("spoil", 0, "spoiled", ("batch_size=2",)),
        ("stop", loop.EXIT_STOPPED, "stopped", ("batch_size=2",)),
        ("", 0, "stopped", ("batch_size=2", "resume_training_from=auto")),
    ]
    jobs = [
        (change, code, arguments(results, f"experiment={name}", *COMMON, *settings))
        for change, code, name, settings in runs
    ]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.stages.two_processes", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return results


def steps(experiment):
    lines = (experiment / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", WAYS)
def test_as_one_process_with_twice_the_batch(name, two, train, tmp_path):
    batch, *others = WAYS[name]
    batch = f"batch_size={2 * int(batch[-1])}"
    assert train("experiment=x", *COMMON, batch, *others) == 0
    expected, found = steps(tmp_path / "x"), steps(two / name)
    assert len(expected) == len(found) >= 4
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and one["lr"] == other["lr"]
        for number, tolerance in TOLERANCE.items():
            if number in one:
                assert other[number] == pytest.approx(one[number], rel=tolerance), number
    rows = [read_cases(folder / "metrics.csv") for folder in (tmp_path / "x", two / name)]
    for one, other in zip(*rows, strict=True):
        for column in ("val_dino_loss", "val_feature_std", "probe_lesion_linear_auc"):
            assert (one[column] == "") == (other[column] == "")
            if one[column]:
                assert float(other[column]) == pytest.approx(float(one[column]), rel=1e-3)


def test_a_bad_batch_on_one_rank_is_skipped_on_both(two):
    plain, spoiled = steps(two / "plain"), steps(two / "spoiled")
    assert equal(plain[:5], spoiled[:5])
    assert [line["loss"] is None for line in spoiled] == [i == 5 for i in range(len(spoiled))]
    log = (two / "spoiled" / "log.txt").read_text()
    assert "step 5 skipped" in log and log.count(CANARY) == 4  # two cases of each rank


def test_a_signal_to_one_rank_stops_both_and_nothing_is_lost(two):
    assert equal(result(two / "stopped"), result(two / "plain"))
    text = (two / "stopped" / "log.txt").read_text()
    assert "SIGTERM: saved at step 6" in text
    assert len(checkpoint.load(two / "stopped" / "checkpoints" / "last.pt")["rng"]) == 2

"""The three scripts as a user meets them: what all runs leave behind, change, and refuse."""

import io
import math
import sys

import numpy as np
import pytest
import torch

from tests.conftest import CANARY, equal, read_cases
from tests.stages import small
from tests.stages.small import STAGES, files_in, files_naming_patients
from utils import checkpoint
from utils.checkpoint import CheckpointError

EACH = pytest.mark.parametrize("stage", STAGES)


def absent(texts: list[str], shown: str) -> list[str]:
    return [text for text in texts if text not in shown]


# ---- what a run leaves behind


@pytest.mark.parametrize(
    ("stage", "files", "plots", "number"),
    [
        (
            *("dino", {"checkpoints/backbone.pt"}),
            *({"curves", "crops", "features", "neighbours", "reconstruction"}, "val_loss"),
        ),
        ("classification", set(), {"curves", "inputs"}, "val_auc"),
        ("segmentation", set(), {"curves", "patches", "val_1", "val_2", "val_3"}, "val_dice"),
    ],
)
def test_a_run_writes_all_its_files(stage, files, plots, number, trained):
    written = {name for name in files_in(trained) if not name.startswith("test/")}
    boards = {name for name in written if name.startswith("tensorboard/")}
    files |= {"config.yaml", "metrics.csv", "log.jsonl", "log.txt", "report.html"}
    files |= {f"checkpoints/{name}.pt" for name in ("last", "previous", "best")}
    assert len(boards) == 1
    files |= {f"plots/{name}.json" for name in plots if name.startswith("val_")}  # for the viewer
    assert written == boards | files | {f"plots/{name}.png" for name in plots}
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png") == len(plots) and number in page
    assert len(list(trained.parent.iterdir())) == 1  # nothing outside the experiment


@pytest.mark.parametrize(
    ("stage", "described"),
    [
        ("dino", ["crops.global_size", "lies beyond the volume"]),
        ("classification", ["image.size", "is padding"]),
        ("segmentation", ["patches.size", "is padding", "mL, in 8 of 8 masks"]),
    ],
)
def test_a_run_says_what_it_will_take_and_what_it_is_trained_on(stage, described, trained):
    """The demo's fingerprint in docs/running.md and that of --check are one."""
    log, page = small.log_of(trained), (trained / "report.html").read_text()
    assert log.count("a step takes ") == 1 and "the rest of the run" in log
    assert "GB of memory so far; checkpoints take 3 x" in log
    assert log.index("a step takes ") < log.index(f"epoch {1}/")
    assert absent(["size, voxels", "spacing x, y, z, mm", "HU", *described], page) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stderr", "shown"), [(io.StringIO, False), (Terminal, True)])
@pytest.mark.parametrize("stage", ["segmentation"])
def test_bars_are_shown_on_a_terminal_alone(stage, stderr, shown, run, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr())
    assert run("n_epochs=1 val_folds=[]") == 0
    text = sys.stderr.getvalue()
    assert ("epoch 1/1: 100%" in text) is shown and bool(text) is shown


@pytest.mark.parametrize(
    ("stage", "tables"),
    [
        ("dino", {"test/features.csv"}),
        ("classification", {"test/predictions.csv", "test/control.csv"}),
        ("segmentation", {"test/cases.csv", "log.txt"}),  # the log says what is odd about masks
    ],
)
def test_patients_are_named_in_the_tables_of_a_test_only(stage, tables, trained, tested, scans):
    predictions = {str(path.relative_to(trained)) for path in tested.glob("predictions/*")}
    assert files_naming_patients(trained) - predictions == tables
    assert files_naming_patients(scans / "cache") == set()


@EACH
def test_the_seed_decides_everything(stage, run, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert run(f"experiment={name} seed={seed} n_epochs=1") == 0
    one, two, other = (small.result(tmp_path / name) for name in ("one", "two", "other"))
    assert equal(one, two) and not equal(one["last"]["modules"], other["last"]["modules"])


# ---- other networks, frozen parts, and what is not finite

FEW = {
    "classification": "n_epochs=1 cls_targets=[bright] image.fit=resize image.size=[18,16,16] "
    "precision=bf16 finetune.layer_decay=0.5 grad_checkpointing=true",
    "segmentation": "n_epochs=1 val_folds=[]",
}
DEEP = "loss.deep_supervision=true"
SEGRESNET = "backbone=segresnet segresnet.feature_size=8"
SWINUNETR = "backbone=swinunetr swinunetr.feature_size=12"
UNET = "backbone=unet unet.feature_size=4"


@pytest.mark.parametrize(
    ("stage", "network"),
    [
        ("classification", SWINUNETR),
        ("classification", UNET),
        ("classification", f"{SEGRESNET} segresnet.blocks=[1,1]"),
        ("classification", f"{SEGRESNET} segresnet.variant=ds segresnet.blocks=[1,1]"),
        ("segmentation", f"{UNET} {DEEP} optimizer=sgd learning_rate=0.01"),
        ("segmentation", f"{SEGRESNET} {DEEP} patches.size=[8,8,8]"),
        ("segmentation", f"{small.DS} {DEEP} precision=bf16 grad_checkpointing=true"),
        (
            "segmentation",
            f"{SWINUNETR} patches.size=[64,32,32] inference.overlap=0 train_folds=[2]",
        ),
    ],
)
def test_other_backbones_train_and_are_tested(stage, network, run, folder):
    assert run(FEW[stage], network) == 0
    # the network of the test is that of the checkpoint, whatever the config says
    best = folder / "checkpoints" / "best.pt"
    saved = checkpoint.load(best)
    config = saved["config"]  # as in files from before these keys
    del config["steps_per_epoch"], config["augment"]["drop_channel"]
    del config["data"]["channels"], config["data"]["missing_channels"]
    checkpoint.save(best, saved)
    assert run(f"test_ckpt={best}") == 0
    if stage == "classification":  # 4 cases: a class and a number of each
        assert len(read_cases(folder / "test" / "predictions.csv")) == 8
    else:  # 3 cases, 2 classes
        assert len(read_cases(folder / "test" / "cases.csv")) == 6


@pytest.mark.parametrize(
    ("stage", "others"), [("classification", "cls_targets=[bright]"), ("segmentation", "")]
)
def test_few_cases_get_as_many_steps_as_many_cases(stage, others, run, tmp_path):
    def rates_and_epochs(name, folds):
        given = "steps_per_epoch=3 accumulate=2 warmup_epochs=1 batch_size=3 val_folds=[]"
        assert run(f"experiment={name} {folds}", given, others) == 0
        ends = small.epochs(tmp_path / name)["step"].tolist()
        return [line["lr"] for line in small.steps(tmp_path / name)], [end for end in ends if end]

    few, many = rates_and_epochs("few", "train_folds=[0]"), rates_and_epochs("many", "")
    assert few == many and few[1] == [3, 6]
    assert few[0] == pytest.approx([f * few[0][3] for f in (0, 1 / 3, 2 / 3)] + few[0][3:])


@pytest.mark.parametrize(
    ("stage", "frozen", "num_epochs", "others"),
    [
        ("classification", "backbone.", 2, ""),
        ("segmentation", "backbone.encoder.", 1, "finetune.encoder_lr=0.1 val_folds=[]"),
    ],
)
def test_what_is_frozen_moves_when_its_epochs_are_over(
    stage, frozen, num_epochs, others, run, monkeypatch, folder
):
    calls, still = small.observe(monkeypatch, stage), []
    freeze = f"finetune.freeze_epochs={num_epochs} n_epochs={num_epochs + 1} warmup_epochs=1"
    assert run(freeze, others) == 0
    rates = [line["lr"] for line in small.steps(folder)]
    assert [i for i, rate in enumerate(rates) if rate == 0] == [0, 4 * num_epochs]
    for call, rate in zip(calls, rates, strict=True):
        before, after = (call[n]["modules"][STAGES[stage].network] for n in ("before", "after"))
        part = [key for key in before if key.startswith(frozen)]
        assert part and (rate == 0 or not equal(before, after))
        still.append(all(equal(before[key], after[key]) for key in part))
    assert still == [True] * (4 * num_epochs + 1) + [False] * 3


@pytest.mark.parametrize(
    ("stage", "spoil", "value", "others"),
    [
        ("dino", small.spoil_loss, math.nan, ""),
        ("dino", small.spoil_loss, math.inf, ""),
        ("dino", small.spoil_voxels, math.nan, ""),
        ("classification", small.spoil_loss, math.nan, ""),
        # BatchNorm, whose statistics move
        ("segmentation", small.spoil_loss, math.nan, f"{small.DS} val_folds=[]"),
    ],
)
def test_a_step_that_is_not_finite_leaves_no_trace(
    stage, spoil, value, others, run, monkeypatch, folder
):
    spoil(monkeypatch, stage, {1}, value)
    calls = small.observe(monkeypatch, stage)
    assert run("n_epochs=1", others) == 0
    assert [call["ok"] for call in calls] == [True, False, True, True]
    for i, call in enumerate(calls):
        unchanged = [equal(call["before"][k], call["after"][k]) for k in ("modules", "moments")]
        assert unchanged == [i == 1] * 2
    log = small.log_of(folder)
    line = next(line for line in log.splitlines() if "step 1 skipped" in line)
    assert line.count(CANARY) == 2
    if stage != "segmentation":  # whose log says what is odd about masks
        assert log.count(CANARY) == 2
    assert files_naming_patients(folder) == {"log.txt"}
    assert np.isfinite(small.epochs(folder)["loss"].iloc[-1])
    losses = [line["loss"] for line in small.steps(folder)]
    assert [loss is None for loss in losses] == [False, True, False, False]


# ---- what is refused


@EACH
def test_a_run_is_not_overwritten(stage, trained, script, capsys):
    before = {name: (trained / name).read_bytes() for name in files_in(trained)}
    assert script(f"results_dir={trained.parent} experiment=whole") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert before == {name: (trained / name).read_bytes() for name in files_in(trained)}


@EACH
def test_check_reads_everything_and_writes_no_results(stage, script, capsys, tmp_path):
    said = ["8 train, 5 val, 4 test cases, 0 problems"]
    if stage == "segmentation":
        said = ["8 train, 3 val, 3 test cases, 0 problems", "background: 5", "predicted only"]
    assert script(f"--check cache_dir={tmp_path / 'cache'}") == 0
    assert absent(said, capsys.readouterr().out) == []
    assert files_in(tmp_path) == {"cache/checked.jsonl", "cache/contents.jsonl"}


def spoil_cases(rows):
    rows[0]["path"], rows[1]["fold"] = "absent.nii", ""
    rows[2]["PatientID"] = rows[8]["PatientID"]


def spoil_labels(rows):
    for i, row in enumerate(rows):
        row |= {"id": f"k{i}", "constant": "same", "late": "a" if i < 10 else "bc"[i % 2]}
    rows[0]["late"], rows[1]["path"], rows[2]["hu"] = "b", "absent.nii", "12,5"


def spoil_masks(rows):
    rows[0]["seg_path"], rows[1]["seg_path"] = "", rows[3]["seg_path"]  # of the thin volume


CONFIG = "bacth_size=4 crops.global_size=[18,16,16] precision=fp8 csv_path=no.csv"
TARGETS = "cls_targets=[bright,sise,id,constant,late]"
MISTAKES = [
    ("dino", None, CONFIG, "bacth_size | crops.global_size | precision"),
    ("dino", spoil_cases, "val_folds=[3,9]", "line 2 | absent.nii | empty fold | '9' | CANARY8"),
    (
        *("classification", spoil_labels, TARGETS),
        "no column 'sise'; nearest: 'size' (named by | absent.nii | constant: all 7 train rows | "
        "id: | ID? | '12,5' is not a number | CANARY11 | late: 'c' is in no train row",
    ),
    (
        *("segmentation", spoil_masks, "classes={ball: 300, none: 4}"),
        "no seg_path; a case of train_folds needs a mask | 22 x 20 x 10 voxels | "
        "classes.none: 4 is in no train mask",
    ),
]


@pytest.mark.parametrize(("stage", "spoil", "others", "said"), MISTAKES)
def test_all_mistakes_are_listed_at_once(
    stage, spoil, others, said, script, table, capsys, tmp_path
):
    changed = [table(spoil)] if spoil else []
    assert script(*changed, others) == 2
    assert absent(said.split(" | "), capsys.readouterr().err) == []
    assert files_in(tmp_path) == {"cases.csv" for _ in changed}


@pytest.mark.parametrize(
    ("stage", "folds", "count", "seen"),
    [
        ("classification", "test_folds=[0,4] train_folds=[1]", "3 of 7", [0, 3, 6]),
        ("segmentation", "test_folds=[2,4] train_folds=[] val_folds=[]", "2 of 5", [2, 5]),
    ],
)
def test_patients_that_were_trained_on_are_refused(
    stage, folds, count, seen, best, run, script, capsys, folder
):
    assert script(f"test_ckpt={best}", folds) == 2
    shown = capsys.readouterr().err
    assert f"{count} test rows" in shown and "allow_seen_patients" in shown
    assert [i for i in range(len(small.FOLDS)) if f"{CANARY}{i} " in shown] == seen
    assert run(f"test_ckpt={best} allow_seen_patients=true", folds) == 0
    page = (folder / "test" / "report.html").read_text()
    assert f"{count} test rows" in page and "No fair test" in page


SWIN = f"{SWINUNETR} crops.region_size=[32,32,32] "
SWIN += "crops.global_size=[32,32,32] crops.local_size=[32,32,32] dino.recon_weight=0"
BOTH = ("test_ckpt", "resume_training_from")
TEST, RESUME = BOTH[:1], BOTH[1:]
MISFITS = [  # stage, keys, what the checkpoint is, other settings, what is said of it
    ("dino", BOTH, "absent", "", "no such checkpoint"),
    ("dino", BOTH, "published", "", "not a checkpoint of this | go into suprem_weights"),
    ("dino", BOTH, "pointer", "", "Git LFS pointer"),
    ("dino", BOTH, "older", "", "stage: classification in the checkpoint, dino here"),
    ("dino", BOTH, "dino/backbone", "", "a backbone only; to start from it set suprem_weights"),
    (
        *("dino", BOTH, "dino/best", SWIN),
        "\n  backbone: resunet in the checkpoint, swinunetr here | "
        "\n  swinunetr.feature_size: absent in the checkpoint, 12 here | "
        "\n  resunet.features: [4, 8, 8] in the checkpoint, absent here",
    ),
    (
        *("classification", RESUME, "classification/last", "resunet.features=[4,8,16]"),
        "resunet.features: [4, 8, 8] in the checkpoint",
    ),
    (
        *("classification", RESUME, "classification/last", "cls_targets=[bright]"),
        "classes.size: | in the checkpoint, absent here",
    ),
    ("classification", TEST, "dino/backbone", "", "of stage dino; test_ckpt takes best.pt or last"),
    ("segmentation", TEST, "dino/last", "", "of stage dino; test_ckpt takes best.pt or last"),
    ("segmentation", RESUME, "dino/last", "", "stage: dino in the checkpoint"),
    (
        *("segmentation", RESUME, "segmentation/last", "classes={ball: 300}"),
        "classes.names: | 'ball', 'shell'",
    ),
]


@pytest.mark.parametrize(
    ("stage", "key", "kind", "others", "said"),
    [(stage, key, *others) for stage, keys, *others in MISFITS for key in keys],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    stage, key, kind, others, said, trained_of, run, tmp_path
):
    path = tmp_path / "file.pt"
    if kind == "published":
        torch.save({"net": {"module.x": torch.ones(3)}}, path)
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    elif kind == "older":
        whole = small.load(trained_of("dino"))
        whole["settings"]["stage"] = "classification"
        del whole["format"]
        checkpoint.save(path, whole)
    elif "/" in kind:
        of_stage, name = kind.split("/")
        path = trained_of(of_stage) / "checkpoints" / f"{name}.pt"
    with pytest.raises(CheckpointError) as caught:
        run(f"{key}={path}", others)
    assert absent(said.split(" | "), str(caught.value)) == []

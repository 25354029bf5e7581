"""What the features of a frozen encoder say of masks or labels: ridge regression from few cases.

    python -m data.probe segmentation|classification [key=value ...] [--config FILE]

The keys are those of segmentation.py or classification.py: dino_weights, csv_path, train_folds to
fit, test_folds to test, and so on (without weights: those of a random encoder). Writes the files of
a test of that script to <results_dir>/<experiment>/test/. How it is done: `data.inference.frozen`.
"""

import sys
from functools import partial
from pathlib import Path

from data.cache import VolumeCache
from data.cases import format_problems
from data.inference.frozen import dense_probe, label_probe, pooled_features
from data.inference.testing import report_test, test_cases
from data.prepare.load import PATH_COLUMNS, load_cases, refuse_seen
from data.prepare.masks import refuse_partly_labelled
from data.prepare.targets import Targets
from data.standard import StandardForm
from data.views.images import standard_form
from models.backbones import facts_of, from_config
from models.classifier import Classifier
from utils import distributed
from utils.classes import Classes, refuse_overlap
from utils.config.classification import ClassificationConfig, impossible_classification
from utils.config.command_line import parse_command_line, save_resolved
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.errors import InputError
from utils.report.classification import write_test_report
from utils.signals import StopSignal
from utils.training import step
from utils.training.run import Run, exit_code
from utils.weights import load_backbone

ROOT = Path(__file__).parents[2]
STAGES = {
    "segmentation": (SegmentationConfig, impossible_segmentation),
    "classification": (ClassificationConfig, impossible_classification),
}
NUM_PICTURES = 3


def segmentation(run: Run[SegmentationConfig], backbone, seen) -> None:
    """Fit on the masks of the train folds, predict and score the test folds, to test/."""
    cfg = run.cfg
    cache = VolumeCache(cfg.cache_dir, StandardForm.from_config(cfg.data))
    classes = Classes.from_config(cfg.classes, cfg.ignore_labels)
    refuse_overlap(classes)
    cases, skipped = load_cases(with_test(cfg), cache, [], PATH_COLUMNS[::-1], False, classes)
    refuse_partly_labelled(cases["train"])
    notes = refuse_seen(cases["test"], seen, "dino_weights", cfg.allow_seen_patients)
    print(format_problems(skipped))
    predict = dense_probe(run, backbone, cache, cases["train"], classes)
    title = f"Frozen probe of {cfg.experiment}"
    content = {"cases": cases["test"], "cache": cache, "classes": classes}
    with run.new_results() as folder:
        rows = test_cases(run, predict, folder=folder, **content)
        report_test(run, folder, title, rows, notes=notes, num_pictures=NUM_PICTURES, **content)


def classification(run: Run[ClassificationConfig], backbone, seen) -> None:
    """Fit on the labels of the train folds, predict and score the test folds, to test/."""
    cfg, cache = run.cfg, VolumeCache(run.cfg.cache_dir, standard_form(run.cfg))
    columns = [*cfg.cls_targets, *cfg.reg_targets, *cfg.report_by]
    cases, skipped = load_cases(with_test(cfg), cache, columns, PATH_COLUMNS, False)
    notes = refuse_seen(cases["test"], seen, "dino_weights", cfg.allow_seen_patients)
    targets, problems = Targets.fit(cases["train"], cfg.cls_targets, cfg.reg_targets)
    problems += targets.check(cases["test"])
    if problems:
        raise InputError(format_problems(problems))
    print(format_problems(skipped))
    classifier = Classifier(backbone, targets.num_outputs, cfg.head.pooling).to(run.device).eval()
    features = partial(pooled_features, run, classifier.pooled, cache)
    train_x, test_x = features(cases["train"]), features(cases["test"])
    content = {"targets": targets, "cases": cases["test"], "notes": notes, "seed": cfg.seed}
    content["predictions"] = label_probe(targets, cases["train"], train_x, test_x)
    content |= {"report_by": cfg.report_by, "control": None, "images": None}
    title = f"Frozen probe of {cfg.experiment}"
    with run.new_results() as folder:
        write_test_report(folder, title, **content)
        save_resolved(cfg, folder / "config.yaml")


def with_test(cfg):
    """Return the config as `load_cases` needs it to read the test folds too."""
    return cfg.model_copy(update={"test_ckpt": ["frozen probe"]})


def main(argv: list[str]) -> int:
    stage = argv[0] if argv else ""
    if stage not in STAGES:
        raise InputError(f"usage: python -m data.probe {'|'.join(STAGES)} [key=value ...]")
    schema, impossible = STAGES[stage]
    default, rules = ROOT / f"{stage}_config.yaml", partial(impossible, facts_of=facts_of)
    cfg, check_only = parse_command_line(argv[1:], default, schema, rules)
    if check_only:
        raise InputError(f"the probe has no --check; python {stage}.py --check reads the same rows")
    run = Run.begin(cfg, distributed.setup(), StopSignal())
    step.seed_everything(cfg.seed)
    backbone, weights, seen = from_config(cfg, decoder=False), cfg.dino_weights, []
    if weights := weights or cfg.suprem_weights:
        report = load_backbone(backbone, weights)
        seen = report.seen_patients
        print(report)
    {"segmentation": segmentation, "classification": classification}[stage](
        run, backbone.to(run.device).eval(), seen
    )
    print(run.folder / "test" / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

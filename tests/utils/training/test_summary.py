"""The box on top of a training report."""

from types import SimpleNamespace

import pytest
import torch

from utils.training import collapse, summary

DINO = SimpleNamespace(out_dim=1024, patch_out_dim=64)
WELL = {"dino_loss": 5.0, "teacher_entropy": 4.0, "target_usage": 5.5, "feature_std": 0.8}
UNIFORM = {**WELL, "teacher_entropy": 6.93}


def run_of(rows, **cfg):
    settings = {"backbone": "resunet", "suprem_weights": None, "n_epochs": 9, "warmup_epochs": 0}
    problems = [SimpleNamespace(row=2, is_notice=False), SimpleNamespace(row=3, is_notice=True)]
    counts = {"train": 8, "val": 3, "parameters": 1_250_000}
    log = SimpleNamespace(rows=rows, skipped=problems)
    settings = SimpleNamespace(**settings | cfg)
    return SimpleNamespace(cfg=settings, counts=counts, log=log, device=torch.device("cpu"))


def state_of(**known):
    known = {"epoch": 3, "best_epoch": 0, "select_by": "loss", "first": None} | known
    return SimpleNamespace(**known)


def test_a_fine_tuning():
    rows = [
        {"epoch": 1, "val_dice": 0.2, "val_a_dice": 0.1, "val_b_dice": 0.3, "seconds": 60.0},
        {"epoch": 2, "val_dice": None, "seconds": 30.0},
        {"epoch": 3, "val_dice": 0.61234, "val_a_dice": 0.7, "val_b_dice": 0.5, "seconds": 60.0},
    ]
    state = state_of(best_epoch=3, select_by="val_dice")
    found = summary.headline(run_of(rows, dino_weights="d/backbone.pt"), state)
    assert found.pop("device").startswith("1 × CPU")
    assert found == {
        "network": "resunet, 1.250 M parameters",
        "started from": "d/backbone.pt",
        "cases": "8 train, 3 val, 1 left out",
        "best epoch": "3 of 9, by val_dice",
        "val_dice": "0.200 (epoch 1) → 0.612 (epoch 3)",
        "worst class or target": "b, val_dice 0.500",
        "training took": "2 min",
    }


@pytest.mark.parametrize("choose", [False, True])
def test_a_pre_training(choose):
    probes = {"probe_lesion_linear_auc": 0.5, "probe_lesion_accuracy": 1.0}
    rows = [{"epoch": 0, "step": 0, **probes}]
    rows += [{"epoch": n, **WELL, "probe_lesion_linear_auc": 0.5 + n / 10} for n in (1, 2, 3)]
    cfg = {"dino": DINO, "probe": SimpleNamespace(choose=choose)}
    state = state_of(best_epoch=2 * choose)
    state.about = {"chosen_by": ["lesion"]}
    found = summary.headline(run_of(rows, **cfg), state)
    reason = "the best by the probes of lesion" if choose else "the newest (probe.choose is false)"
    assert found["backbone.pt"] == f"epoch {2 if choose else 3} of 9, {reason}"
    score = "0.700 (epoch 2)" if choose else "0.800 (epoch 3)"
    assert found["probe_lesion_linear_auc"] == f"0.500 (epoch 0) → {score}"
    assert found["collapse criteria"] == "passed in all 3 epochs"
    assert "probe_lesion_accuracy" not in found


def test_warnings_of_all_epochs_and_the_verdict():
    cfg = SimpleNamespace(dino=DINO, warmup_epochs=0)
    kinds = [WELL, UNIFORM, UNIFORM, WELL, {**UNIFORM, "rankme": None}]
    rows = [{"epoch": 0}, *({"epoch": n, **row} for n, row in enumerate(kinds, 1))]
    (found,) = collapse.history(rows, WELL, cfg)
    assert found["epochs"] == "2-3, 5" and "uniform (collapse)" in found["warning"]
    assert collapse.verdict(rows, WELL, cfg) == "NOT passed in epochs 2-3, 5"
    assert collapse.verdict(rows[:5], WELL, cfg) == "passed at the end, but not in epochs 2-3"
    assert collapse.verdict(rows[:2], WELL, cfg) == "passed in all 1 epochs"
    assert collapse.verdict(rows[:1], WELL, cfg) is None


def test_train_cases_in_a_table():
    def spread(*middle):
        return {"low": [0.5] * 3, "quartiles": [[1] * 3, [*middle], [3] * 3], "high": [4] * 3}

    seen = {"cases": 14, "spacing": spread(2, 2, 5), "size": spread(300, 200, 250)}
    seen |= {"modality": [["CT"], []], "intensity": [spread(-100, 40, 1200), None]}
    text, table, rest = summary.train_cases(seen, [("liver", "1400 mL, in 13 of 14 masks")])
    assert rest == [{"of all cases": "liver", "median (5 to 95 %)": "1400 mL, in 13 of 14 masks"}]
    assert "Of 14 cases" in text and len(table) == 3
    assert table[0]["median"] == "2.000, 2.000, 5.000" and table[0]["lowest"].startswith("0.500")
    assert table[2]["of each case"].startswith("channel 1, CT: 5, 50 and 95 %")
    assert table[2]["of each case"].endswith("HU") and table[2]["median"] == "-100.0, 40.0, 1200"
    assert summary.train_cases(None) == []


def test_durations_in_words():
    assert [summary.in_words(s) for s in (9.4, 150, 8000)] == ["9 s", "2 min", "2 h 13 min"]

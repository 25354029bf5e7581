"""A small config of a study."""

from utils.config.transfer import TransferConfig

VALUES = {
    "out": "out",
    "stage": "segmentation",
    "config": "segmentation_config.yaml",
    "settings": {},
    "arms": {"scratch": None, "dino": "backbone.pt"},
    "permuted": ["dino"],
    "with_decoder": [],
    "arm_settings": {},
    "methods": ["fine_tune", "probe"],
    "label_counts": [2, 4],
    "draws": 3,
    "seeds": 1,
    "seed": 0,
    "steps": 20,
    "tuning": {"learning_rates": [1e-3, 1e-2], "draws": 2, "label_count": None},
    "convergence": {"steps": [10, 20, 40], "label_count": None},
    "at_once": 1,
    "keep_files": False,
}


def config(**changes) -> TransferConfig:
    return TransferConfig.model_validate(VALUES | changes)

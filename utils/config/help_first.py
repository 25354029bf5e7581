"""--help of the three scripts, which import this before all else.

To import torch and MONAI takes several seconds; what can be said without them need not wait. Any
other command line, and --help with something wrong beside it, goes on to `parse_command_line`.
"""

import os
import sys
from pathlib import Path

from utils.config.classification import ClassificationConfig
from utils.config.command_line import help_text
from utils.config.dino import DinoConfig
from utils.config.schema import OPTIONS
from utils.config.segmentation import SegmentationConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "dino.py": (DinoConfig, {}),
    "classification.py": (ClassificationConfig, OPTIONS),
    "segmentation.py": (SegmentationConfig, OPTIONS),
}


def answer(argv: list[str]) -> None:
    """Print the help and exit if the command line of a script is --help or -h alone."""
    script = Path(argv[0]).name
    if script not in SCRIPTS or argv[1:] not in (["--help"], ["-h"]):
        return
    try:
        print(help_text(ROOT / f"{Path(script).stem}_config.yaml", *SCRIPTS[script]), flush=True)
    except BrokenPipeError:  # --help | head; then Python's own flush must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


answer(sys.argv)

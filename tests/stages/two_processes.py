"""Started by torchrun in test_distributed.py: runs of the scripts in two processes, one by one."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.stages import small
from utils import distributed


def main(todo: str) -> None:
    """todo: JSON of [stage, folder of its scans, of its results, jobs]; a job is [what is done to
    rank 1, in which step, expected exit code, overrides]."""
    runs = [(*where, *job) for *where, jobs in json.loads(todo) for job in jobs]
    for stage, scans, results, change, step, code, overrides in runs:
        with pytest.MonkeyPatch.context() as patch:
            if change == "spoil" and os.environ["RANK"] == "1":
                small.spoil_loss(patch, stage, {step})
            if change == "stop" and os.environ["RANK"] == "1":
                small.stop_at(patch, stage, "train_step", step)
            found = small.run(stage, Path(scans), Path(results), overrides)
            assert found == code, f"{stage} {change} {overrides}: exit code {found}"
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

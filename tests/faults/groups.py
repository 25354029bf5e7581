"""All groups of faults, in the order of the table."""

from tests.faults.bombs import BOMBS, ESTIMATES
from tests.faults.cache import CACHE, CACHE_AT_ONCE
from tests.faults.cache_code import CACHE_CODE
from tests.faults.checkpoint_runs import CHECKPOINT_RUNS
from tests.faults.checkpoints import CHECKPOINTS
from tests.faults.crashes import CRASHES
from tests.faults.csv_files import CSV
from tests.faults.decoders import DECODERS
from tests.faults.dicom import DICOM
from tests.faults.finished import FINISHED
from tests.faults.masks import MASKS
from tests.faults.memory import MEMORY
from tests.faults.names import NAMES
from tests.faults.nifti import NIFTI, NIFTI_FLIPS
from tests.faults.numbers import NUMBERS
from tests.faults.privacy import PRIVACY
from tests.faults.pydicom_files import PYDICOM
from tests.faults.ranks import RANKS
from tests.faults.resume import RESUME
from tests.faults.signals import SIGNALS
from tests.faults.weights import WEIGHTS
from tests.faults.workers import WORKERS
from tests.faults.yaml_files import YAML

GROUPS = [
    RESUME,
    CRASHES,
    SIGNALS,
    RANKS,
    WORKERS,
    FINISHED,
    DICOM,
    PYDICOM,
    NIFTI,
    NIFTI_FLIPS,
    MASKS,
    CSV,
    YAML,
    CACHE,
    CACHE_AT_ONCE,
    CACHE_CODE,
    BOMBS,
    ESTIMATES,
    DECODERS,
    WEIGHTS,
    CHECKPOINTS,
    CHECKPOINT_RUNS,
    NUMBERS,
    MEMORY,
    NAMES,
    PRIVACY,
]

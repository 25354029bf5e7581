"""All groups of faults, in the order of the table."""

from tests.faults.cache.code import CACHE_CODE
from tests.faults.cache.damage import CACHE, CACHE_AT_ONCE
from tests.faults.checkpoints.crashes import CRASHES
from tests.faults.checkpoints.files import CHECKPOINTS
from tests.faults.checkpoints.given import CHECKPOINT_RUNS
from tests.faults.checkpoints.weights import WEIGHTS
from tests.faults.dicom.decoders import DECODERS
from tests.faults.dicom.folder import DICOM
from tests.faults.dicom.parts import PARTS
from tests.faults.dicom.pydicom_files import PYDICOM
from tests.faults.dicom.seg import SEG
from tests.faults.files.bombs import BOMBS, ESTIMATES
from tests.faults.files.channels import CHANNELS
from tests.faults.files.csv_files import CSV
from tests.faults.files.formats import FORMATS
from tests.faults.files.labels import LABELS
from tests.faults.files.masks import MASKS
from tests.faults.files.nifti import NIFTI, NIFTI_FLIPS
from tests.faults.files.values import VALUES
from tests.faults.files.yaml_files import YAML
from tests.faults.private.names import NAMES
from tests.faults.private.privacy import PRIVACY
from tests.faults.runs.crossing import CROSSING
from tests.faults.runs.finished import FINISHED
from tests.faults.runs.memory import MEMORY
from tests.faults.runs.numbers import NUMBERS
from tests.faults.runs.predicting import PREDICTING
from tests.faults.runs.ranks import RANKS
from tests.faults.runs.resume import RESUME
from tests.faults.runs.signals import SIGNALS
from tests.faults.runs.workers import WORKERS

GROUPS = [
    RESUME,
    CRASHES,
    SIGNALS,
    RANKS,
    WORKERS,
    FINISHED,
    CROSSING,
    PREDICTING,
    DICOM,
    PARTS,
    PYDICOM,
    SEG,
    NIFTI,
    NIFTI_FLIPS,
    FORMATS,
    MASKS,
    LABELS,
    CHANNELS,
    CSV,
    VALUES,
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

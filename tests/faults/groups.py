"""All groups of faults, in the order of the table."""

from tests.faults.bombs import BOMBS, ESTIMATES
from tests.faults.cache import CACHE, CACHE_AT_ONCE
from tests.faults.csv_files import CSV
from tests.faults.decoders import DECODERS
from tests.faults.dicom import DICOM
from tests.faults.masks import MASKS
from tests.faults.names import NAMES
from tests.faults.nifti import NIFTI, NIFTI_FLIPS
from tests.faults.privacy import PRIVACY
from tests.faults.pydicom_files import PYDICOM
from tests.faults.weights import WEIGHTS
from tests.faults.yaml_files import YAML

GROUPS = [
    DICOM,
    PYDICOM,
    NIFTI,
    NIFTI_FLIPS,
    MASKS,
    CSV,
    YAML,
    CACHE,
    CACHE_AT_ONCE,
    BOMBS,
    ESTIMATES,
    DECODERS,
    WEIGHTS,
    NAMES,
    PRIVACY,
]

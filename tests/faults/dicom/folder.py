"""Odd DICOM folders: the right volume, or one error that names file or folder."""

from data.readers import read_volume
from tests.faults.dicom.damage import content, damage
from tests.faults.dicom.folders import several, strays
from tests.faults.dicom.frames import multi_frame
from tests.faults.dicom.geometry import geometry
from tests.faults.dicom.series import encodings, orders, values
from tests.faults.dicom.variants import VARIANTS
from tests.faults.frame import Group

FAULTS = [
    *orders(),
    *values(),
    *encodings(),
    *multi_frame(),
    *strays(),
    *several(),
    *geometry(),
    *damage(),
    *content(),
]
DICOM = Group("DICOM folders", read_volume, FAULTS, VARIANTS, every=5)

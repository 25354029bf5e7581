"""Odd DICOM folders: the right volume, or one error that names file or folder."""

from data.readers import read_volume
from tests.faults.dicom.damage import content, damage, flips, wrong_syntaxes
from tests.faults.dicom.folders import other_images, several_series, several_volumes, strays
from tests.faults.dicom.frames import multi_frame, multi_frame_refused
from tests.faults.dicom.geometry import interpolated, irregular_stacks, unusable_elements
from tests.faults.dicom.series import encodings, orders, values
from tests.faults.dicom.variants import VARIANTS
from tests.faults.frame import Group

FAULTS = [
    *orders(),
    *values(),
    *encodings(),
    *multi_frame(),
    *multi_frame_refused(),
    *strays(),
    *other_images(),
    *several_series(),
    *several_volumes(),
    *unusable_elements(),
    *irregular_stacks(),
    *interpolated(),
    *damage(),
    *wrong_syntaxes(),
    *flips(),
    *content(),
]
DICOM = Group("DICOM folders", read_volume, FAULTS, VARIANTS, every=5)

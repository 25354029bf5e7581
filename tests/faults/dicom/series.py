"""DICOM series that must be read rightly: orders, values, encodings."""

import struct
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from data.volume import Volume
from tests.data.dicom.factory import (
    AXIAL,
    CORONAL,
    OBLIQUE,
    SAGITTAL,
    assert_phantom,
    make_series,
    pack_by_gdcm,
    paint,
    save,
    save_series,
)
from tests.faults.dicom.build import (
    LARGE,
    LARGE_SHAPE,
    SECRETS,
    SHAPE,
    SYNTAXES,
    Build,
    Series,
    each,
    files,
    numbered,
    read,
    replace,
    right,
    series,
)
from tests.faults.frame import RIGHT, Fault, Outcome, judge

# ---- right: order, orientation, numbers that say nothing


def orders() -> list[Fault]:
    planes = {"axial": AXIAL, "coronal": CORONAL, "sagittal": SAGITTAL, "oblique": OBLIQUE}
    found = [
        right(f"{name}, {order}", series(numbered(numbers), orientation=plane))
        for name, plane in planes.items()
        for order, numbers in (("numbered upwards", range(8)), ("downwards", range(8, 0, -1)))
    ]

    def tied(made: Series) -> None:
        for k, ds in enumerate(made):
            ds.SliceLocation = repr(float((k * 3) % 8))
            ds.SpacingBetweenSlices = "-7.5"

    def named_backwards(folder: Path) -> Path:
        for k, ds in enumerate(make_series()):
            ds.InstanceNumber = 8 - k
            save(ds, folder / f"IM{90 - k}.dcm")
        return folder

    return found + [
        right("InstanceNumber missing", series(each(InstanceNumber=None))),
        right("InstanceNumber the same", series(each(InstanceNumber=1))),
        right("InstanceNumber shuffled", series(numbered([0, 5, 2, 7, 4, 1, 6, 3]))),
        right("InstanceNumber empty", series(each(InstanceNumber=""))),
        right("SliceLocation and SpacingBetweenSlices wrong", series(tied)),
        right("SliceThickness thicker than the gap", series(each(SliceThickness="5.0"))),
        right("names against the order", named_backwards),
        right("1 % jitter of positions", series(_jitter, slices=30), (12, 10, 30), tolerance=3),
        *(
            right(
                f"directions of {digits} digits",
                series(partial(_rounded, digits=digits), slices=40, orientation=OBLIQUE),
                (12, 10, 40),
                tolerance,
            )
            for digits, tolerance in ((4, 0.6), (5, 0.501))
        ),
        right("one slice with its thickness", series(slices=1), (12, 10, 1)),
        right("two slices", series(slices=2), (12, 10, 2)),
        right("images of 1 x 1 pixel", series(rows=1, columns=1), (1, 1, 8)),
    ]


def _jitter(made: Series) -> None:
    rng = np.random.default_rng(0)
    for ds in made:
        moved = np.array(ds.ImagePositionPatient, float) + rng.normal(0, 0.01 * 2.5, 3)
        ds.ImagePositionPatient = [f"{mm:.6f}" for mm in moved]


def _rounded(made: Series, digits: int) -> None:
    for ds in made:
        cosines = [repr(round(float(c), digits)) for c in ds.ImageOrientationPatient]
        ds.ImageOrientationPatient = cosines


# ---- right: values


def values() -> list[Fault]:
    per_slice = {"slope": np.linspace(1, 2.75, 8), "intercept": np.arange(8) * 10.0}
    signed_values = {"signed": True, "intercept": 2000.0}
    kinds = {"12 bits": {"bits_stored": 12}, "13 bits signed": {"bits_stored": 13} | signed_values}
    kinds |= {"16 bits": {}, "16 bits signed": signed_values}
    found = [
        right(f"{name}, {kind}", series(syntax=syntax, **options, **LARGE), LARGE_SHAPE)
        for name, syntax in SYNTAXES.items()
        for kind, options in kinds.items()
    ]
    for coding in ("implicit", "explicit", "big endian", "RLE"):
        for signed, high_bit in ((False, 11), (True, 11), (False, 15), (True, 13)):
            options = {"bits_stored": 12} | (signed_values if signed else {})
            words = series(partial(_foreign_bits, high_bit=high_bit), SYNTAXES[coding], **options)
            build = files(partial(_set_bits, high_bit=high_bit), words)
            name = f"foreign bits around 12, high bit {high_bit}" + ", signed" * signed
            found.append(right(f"{name}, {coding}", build))
    for coding in ("implicit", "explicit", "big endian", "RLE", "JPEG 2000"):
        options = {"bits_allocated": 8, "bits_stored": 8, "slope": 16.0, "rows": 37, "columns": 39}
        change = _padded_bytes if coding == "big endian" else lambda _: None
        build = series(change, SYNTAXES[coding], **options)
        found.append(right(f"8 bits, {coding}", build, (39, 37, 8), 8.001, np.int16))
    for coding in ("explicit", "big endian"):
        for signed in (False, True):
            options = {"bits_allocated": 32, "bits_stored": 32, "signed": signed}
            build = series(syntax=SYNTAXES[coding], **options)
            name = f"32 bits, {coding}" + ", signed" * signed
            found.append(right(name, build, dtype=np.int16))

    def mixed_coding(folder: Path) -> Path:
        for k, ds in enumerate(make_series(**LARGE)):
            save(ds, folder / f"{k}", list(SYNTAXES.values())[k % 7])
        return folder

    def mixed_sign(made: Series) -> None:
        for ds in made[::2]:
            ds.PixelRepresentation, ds.RescaleIntercept = 1, "1000"
            paint(ds)

    def number_formats(made: Series) -> None:
        for k, ds in enumerate(made):
            ds.PixelSpacing = ["1.5E0", "1.25"] if k % 2 else ["1.500 ", "+1.25"]

    return found + [
        right(
            "rescaling of each slice its own",
            series(**per_slice),
            tolerance=1.501,
            dtype=np.float32,
        ),
        right(
            "integer rescaling",
            series(slope=[1, 2] * 4, intercept=[-1024, 0] * 4),
            tolerance=1.001,
            dtype=np.int16,
        ),
        right("negative slope", series(slope=-1.0, intercept=5000.0)),
        right("no rescaling", series(each(RescaleSlope=None, RescaleIntercept=None))),
        right("float pixels", series(_float_pixels), tolerance=0.76, dtype=np.float32),
        right("transfer syntaxes mixed", mixed_coding, LARGE_SHAPE),
        right("signed and unsigned mixed", series(mixed_sign)),
        right("numbers written in other ways", series(number_formats)),
        *(Fault(f"slopes of {unit:g}", partial(_in_units, unit), RIGHT) for unit in (1e-8, 1e7)),
        right("MONOCHROME1", series(each(PhotometricInterpretation="MONOCHROME1"))),
    ]


def _in_units(unit: float, folder: Path, reader) -> Outcome:
    """PET: the slope is another one in each slice, and may be very small."""
    slopes = np.linspace(0.2, 0.9, 8)
    made = make_series(slope=slopes)
    for ds, slope in zip(made, slopes, strict=True):
        ds.RescaleSlope, ds.Modality, ds.Units = f"{slope * unit:.9e}", "PT", "BQML"
    path = save_series(made, folder / "series")

    def is_right(volume) -> None:
        assert_phantom(Volume(volume.voxels / unit, volume.affine), SHAPE, 0.5)
        assert volume.modality in ("PT", None)

    return judge(lambda: reader(path), is_right, [str(path)], secrets=SECRETS)


def _foreign_bits(made: Series, high_bit: int) -> None:
    for ds in made:
        words = np.frombuffer(ds.PixelData, "<u2").astype(np.uint32)
        below = high_bit - 11
        foreign = np.arange(words.size) % 7 * 0x2421 & ~(0xFFF << below) & 0xFFFF
        ds.PixelData = ((words << below) | foreign).astype("<u2").tobytes()
        ds.BitsStored, ds.HighBit = 16, 15  # the encoder of RLE insists


def _set_bits(paths: list[Path], high_bit: int) -> None:
    for path in paths:
        ds = pydicom.dcmread(path)
        ds.BitsStored, ds.HighBit = 12, high_bit
        ds.save_as(path)


def _padded_bytes(made: Series) -> None:
    """An odd number of bytes, padded; those of OB are not swapped."""
    for ds in made:
        ds["PixelData"].VR = "OB"
        ds.PixelData += b"\0"


def _float_pixels(made: Series) -> None:
    for ds in made:
        ds.FloatPixelData = (np.frombuffer(ds.PixelData, "<u2") + np.float32(0.25)).tobytes()
        ds.BitsAllocated = 32
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation


# ---- right: files


def encodings() -> list[Fault]:
    def bare(syntax) -> Build:
        def build(folder: Path) -> Path:
            made = make_series()
            if syntax == ExplicitVRBigEndian:
                for ds in made:
                    ds.PixelData = np.frombuffer(ds.PixelData, "<u2").byteswap().tobytes()
            return save_series(made, folder / "series", syntax, preamble=False)

        return build

    def mislabelled(paths: list[Path]) -> None:
        for path in paths:  # the file says explicit, its data set is implicit
            replace(path, b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1", grow=True)

    jpeg = series(syntax=JPEG2000Lossless, **LARGE)
    found = [
        right(f"no preamble, {name}", bare(SYNTAXES[name]))
        for name in ("implicit", "explicit", "big endian")
    ]
    return found + [
        right("header of 300 kB", series(_private_block)),
        right("icon with Rows and pixels of its own", series(_icon)),
        right("geometry of other images nested within", series(_nested)),
        right("nested within, undefined lengths", series(partial(_nested, undefined=True))),
        right("nested within, implicit", series(_nested, ImplicitVRLittleEndian)),
        right("padded pixel data", series(_padded, rows=9, columns=11), (11, 9, 8)),
        right("padding after the data set", files(_trailing)),
        right("lossless JPEG", files(lossless_jpeg)),
        right("JPEG 2000 in fragments", files(_fragmented, jpeg), LARGE_SHAPE),
        right("JPEG 2000 within a JP2 file", files(as_jp2, jpeg), LARGE_SHAPE),
        right(
            "JPEG 2000 within a JP2 file of nonsense",
            files(partial(as_jp2, header=bytes(range(40))), jpeg),
            LARGE_SHAPE,
        ),
        Fault(
            "explicit by name, implicit within",
            partial(read, files(mislabelled, series(syntax=ImplicitVRLittleEndian)), SHAPE, 0.501),
        ),
        right(
            "patient with umlauts",
            series(each(SpecificCharacterSet="ISO_IR 100", PatientName="Secret^Müller")),
        ),
        right("private image class", series(each(SOPClassUID="1.2.840.113619.4.2"))),
        right("symbolic links", _links),
    ]


def _private_block(made: Series) -> None:
    for ds in made:
        ds.private_block(0x0029, "PHANTOM", create=True).add_new(0x10, "OB", bytes(300_000))


def _icon(made: Series) -> None:
    for ds in made:
        icon = make_series(slices=1, rows=4, columns=4)[0]
        icon.Rows, icon.Columns = 4, 4
        ds.IconImageSequence = Sequence([icon])


def _nested(made: Series, undefined: bool = False) -> None:
    """Positions of other images in sequences that come before and after our own."""
    other = make_series(slices=1, orientation=SAGITTAL, spacing=(2.0, 2.0))[0]
    del other.PixelData
    for ds in made:
        ds.ReferencedImageSequence = Sequence([other])
        ds.RequestAttributesSequence = Sequence([other])
        if undefined:
            for keyword in ("ReferencedImageSequence", "RequestAttributesSequence"):
                ds[keyword].is_undefined_length = True
                ds[keyword].value[0].is_undefined_length_sequence_item = True


def _padded(made: Series) -> None:
    for ds in made:
        ds.PixelData += b"\0" * 2


def _trailing(paths: list[Path]) -> None:
    for path in paths:
        path.write_bytes(
            path.read_bytes() + struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, 8) + bytes(8)
        )


def lossless_jpeg(paths: list[Path]) -> None:
    for path in paths if find_spec("gdcm") else ():  # without it, this is the plain series
        pack_by_gdcm(path, path, "JPEGLosslessProcess14_1")


def _fragmented(paths: list[Path]) -> None:
    for path in paths:
        ds = pydicom.dcmread(path)
        frame = next(generate_frames(ds.PixelData, number_of_frames=1))
        ds.PixelData = encapsulate([frame], fragments_per_frame=3, has_bot=False)
        ds.save_as(path)


def as_jp2(paths: list[Path], header: bytes = b"", kind: bytes = b"jp2c") -> None:
    """Streams as files of their own: boxes of a mark, a type, a header and the image."""
    for path in paths:
        ds = pydicom.dcmread(path)
        stream = next(generate_frames(ds.PixelData, number_of_frames=1)).rstrip(b"\0")
        boxes = ((b"jP  ", b"\r\n\x87\n"), (b"ftyp", b"jp2 \0\0\0\0jp2 "), (b"jp2h", header))
        packed = [struct.pack(">I4s", 8 + len(d), k) + d for k, d in (*boxes, (kind, stream))]
        ds.PixelData = encapsulate([b"".join(packed)])
        ds.save_as(path)


def _links(folder: Path) -> Path:
    source = save_series(make_series(), folder / "store")
    path = folder / "series"
    path.mkdir()
    for k, file in enumerate(source.iterdir()):
        (path / f"{k}.dcm").symlink_to(file)
    return path

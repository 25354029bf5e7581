"""What the names of files and folders say: image or mask, of which case, which modality."""

import re
from pathlib import Path

IMAGE_FOLDERS = set("image images img imgs imagestr imagests imagesval scan scans volume".split())
IMAGE_FOLDERS |= set("volumes ct mr mri pet data nifti nii anat train test val".split())
MASK_FOLDERS = set("mask masks label labels labelstr labelsts labelsval seg segs".split())
MASK_FOLDERS |= set("segmentation segmentations groundtruth gt annotation annotations".split())
MASK_WORDS = set("mask label labels seg segmentation gt groundtruth dseg aseg lesionmask".split())
MODALITY_OF = dict.fromkeys(
    "t1 t2 t1w t2w t1c t1n t1ce t1gd t2f pd pdw flair dwi adc swi".split(), "MR"
)
MODALITY_OF |= dict.fromkeys("mr mri t1ww t2star bold angio tof".split(), "MR")
MODALITY_OF |= {"ct": "CT", "cta": "CT", "ncct": "CT", "cect": "CT", "cbct": "CT"}
MODALITY_OF |= {"pet": "PT", "pt": "PT", "us": "US"}
IMAGE_WORDS = {"image", "img", "volume", "scan", *MODALITY_OF}
SUFFIX = re.compile(r"\.((nii|hdr|img|mgh)(\.gz)?|mgz|mha|mhd|nrrd|nhdr)$", re.IGNORECASE)
BIDS_NAME = re.compile(r"sub-[^_]+(_[a-zA-Z]+-[^_]+)*_[a-zA-Z0-9]+")
OF_A_MASK = {"desc", "label", "space", "seg", "atlas", "res", "den", "hemi"}  # entities of BIDS


def stem(path: Path) -> str:
    return SUFFIX.sub("", path.name)


def words(text: str) -> list[str]:
    return re.split(r"[_\-. ]+", text.lower())


def is_mask(path: Path, by_word: bool = True) -> bool:
    """Return whether a path, relative to the tree, names a mask: by a folder or, if `by_word`, by
    the first or last word of its name."""
    if any(part.lower() in MASK_FOLDERS for part in path.parts[:-1]):
        return True
    found = words(stem(path))
    return by_word and len({found[0], found[-1]} & MASK_WORDS) > 0


def key(path: Path) -> tuple[str, ...]:
    """Return what an image and its mask have in common: the folders, then the name, in lower case
    and without the words that tell images from masks.

    path: relative to the tree.
    """
    name = stem(path)
    if BIDS_NAME.fullmatch(name):
        entities = name.split("_")[:-1]
        return ("bids", *(e for e in entities if e.partition("-")[0] not in OF_A_MASK))
    generic = IMAGE_FOLDERS | MASK_FOLDERS
    folders = [part.lower() for part in path.parts[:-1] if part.lower() not in generic]
    found = words(name)
    while found and found[-1] in MASK_WORDS | IMAGE_WORDS:
        found.pop()
    while found and found[0] in MASK_WORDS | {"image", "img", "volume", "scan"}:
        found.pop(0)
    return (*folders, "_".join(found))


def names_it(image: Path, mask: Path) -> bool:
    """Return whether a mask has the whole name of an image, sequence included, and words for masks
    alone beside it: P001_t1c_seg of P001_t1c, but not of P001_t1."""
    found = words(stem(mask))
    while found and found[-1] in MASK_WORDS:
        found.pop()
    while found and found[0] in MASK_WORDS:
        found.pop(0)
    return found == words(stem(image))


def related(image: tuple[str, ...], mask: tuple[str, ...]) -> bool:
    """Return whether two different keys are of one folder, and the name of one continues that of
    the other after a word: P001 and P001_liver, but not P001 and P0012."""
    if image[:-1] != mask[:-1]:
        return False
    short, long = sorted((image[-1], mask[-1]), key=len)
    return not short or long.startswith(short + "_")


def modality_by_name(path: Path) -> str:
    """Return the modality that the words of a name, or else of its folders, agree on, or ""."""
    for texts in ([stem(path)], path.parts[:-1]):
        found = {MODALITY_OF[word] for text in texts for word in words(text) if word in MODALITY_OF}
        if found:
            return found.pop() if len(found) == 1 else ""
    return ""


def case_by_name(path: Path) -> str:
    """Return a file's name without the words for sequences and images at its end: its case."""
    name = stem(path)
    while shorter := re.fullmatch(r"(.+)[_\-. ]+([a-zA-Z0-9]+)", name):
        if shorter[2].lower() not in IMAGE_WORDS:
            break
        name = shorter[1]
    return name

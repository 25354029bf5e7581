"""Reading pictures of reports back."""

import numpy as np
from matplotlib.image import imread


def on_white(path) -> np.ndarray:
    """The pixels of a PNG without background, on white, (H, W, 3) uint8."""
    rgba = imread(path)
    assert (rgba[0, 0] == [1, 1, 1, 0]).all()  # what is behind the picture is the page
    return np.rint(255 * (1 - rgba[..., 3:] * (1 - rgba[..., :3]))).astype(np.uint8)

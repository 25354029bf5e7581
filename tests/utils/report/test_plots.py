import numpy as np
import pandas as pd
import pytest

from tests.utils.report.pictures import on_white
from utils.report import plots
from utils.report.plots import pca_rgb, plot_crops, plot_curves, plot_feature_pca, slice_2d


def _same_picture(path, rgb):
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
    return np.array_equal(on_white(path), rgb)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_are_upright(plane):
    """In RAS+ the last index is right, front, head."""
    volume = np.zeros((3, 4, 5, 3))
    volume[-1, :, :, 0] = 1  # right
    volume[:, -1, :, 1] = 1  # front
    volume[:, :, -1, 2] = 1  # head
    picture = slice_2d(volume, plane, 0)
    left, top = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    assert picture[:, 0, left].all() and not picture[:, 1:, left].any()
    assert picture[0, :, top].all() and not picture[1:, :, top].any()


def test_crops(tmp_path):
    rng = np.random.default_rng(0)
    views = {"global 1": rng.random((4, 12, 16, 20)), "local 1": rng.random((4, 8, 8, 8))}
    assert _same_picture(tmp_path / "crops.png", plot_crops(tmp_path / "crops.png", views))
    one = plot_crops(tmp_path / "one.png", {"global 1": views["global 1"][:1]})
    assert _same_picture(tmp_path / "one.png", one)


def test_a_channel_of_zeros_says_so(tmp_path):
    def drawn(value):
        views = {"image": np.ones((1, 8, 8, 8)), "target": np.zeros((1, 8, 8, 8, 3))}
        views["image t2"] = np.full((1, 8, 8, 8), value)
        picture = plot_crops(tmp_path / "a.png", views).astype(int)
        return np.count_nonzero(picture[..., 0] - picture[..., 2] > 100)  # yellow, as texts

    assert drawn(0.0) > drawn(1e-6) + 10


def test_colours_texts_and_a_legend(tmp_path):
    views = {"image": np.zeros((2, 8, 8, 8)), "target": np.zeros((2, 8, 8, 8, 3))}
    views["target"][0] = (0, 0, 1)
    plain = plot_crops(tmp_path / "a.png", views)
    blue = (plain == (0, 0, 255)).all(axis=-1).sum()
    assert blue > 1000  # the first case of two
    told = {"image": ["$y_: 1", "b"]}
    rich = plot_crops(tmp_path / "a.png", views, texts=told, legend={"kidney": "red"})
    assert _same_picture(tmp_path / "a.png", rich)
    assert len(rich) > len(plain) and ((rich == (255, 0, 0)).all(axis=-1)).sum() > 10
    assert (rich[-900:] != plain[-900:]).any()  # what is written on the first view


def test_curves_take_dicts_and_tables_and_skip_what_is_absent(tmp_path):
    rows = [
        {"epoch": i, "step": 9 * i, "loss": 8 - i, "teacher_entropy": 4.0, "lesion_knn_auc": None}
        for i in range(4)
    ]
    rows[2] |= {"lesion_knn_auc": 0.7, "loss": float("nan")}
    from_rows = plot_curves(tmp_path / "a.png", rows, out_dim=4096)
    from_table = plot_curves(tmp_path / "b.png", pd.DataFrame(rows), out_dim=4096)
    assert _same_picture(tmp_path / "a.png", from_rows)
    assert (from_rows == from_table).all()
    fewer = plot_curves(tmp_path / "c.png", [{"epoch": 0, "loss": 1.0}])
    assert fewer.shape[1] < from_rows.shape[1]
    plot_curves(tmp_path / "empty.png", [])


def test_what_the_student_lacks_has_a_panel_of_its_own():
    rows = [{"epoch": 0}, {"epoch": 1, "dino_loss": 7.0, "teacher_entropy": 2.5}]
    series = plots._series(plots._with_kl(rows))
    assert series["dino_kl"] == ((1,), (4.5,)) and "dino_kl" not in rows[1]
    assert plots._panel_of("dino_kl").startswith("DINO loss without")


def test_pca_finds_the_planted_components():
    rng = np.random.default_rng(0)
    planted = rng.random((3, 6, 7, 8))
    mixing = np.linalg.qr(rng.normal(size=(16, 3)))[0] * [9, 3, 1]
    features = np.einsum("ck,kxyz->cxyz", mixing, planted) + 5
    rgb = pca_rgb(features)
    assert rgb.shape == (6, 7, 8, 3) and rgb.min() >= 0 and rgb.max() <= 1
    for i in range(3):
        found = np.corrcoef(rgb[..., i].ravel(), planted[i].ravel())[0, 1]
        assert abs(found) > 0.9
    assert (pca_rgb(np.ones((2, 3, 3, 3))) == 0.5).all()


def test_feature_pca_lies_on_the_image(tmp_path):
    volume = np.zeros((16, 24, 8), np.float32)
    coarse = np.zeros((4, 4, 6, 2), np.float32)
    coarse[1, 3] = 1  # the patient's right
    rgb = plot_feature_pca(tmp_path / "one.png", volume, coarse, num_slices=2)
    assert _same_picture(tmp_path / "one.png", rgb)
    two = plot_feature_pca(tmp_path / "two.png", volume, [coarse, coarse], ["a", "b"], num_slices=2)
    assert two.shape[0] > rgb.shape[0]


def test_features_are_drawn_over_slices_through_the_whole_volume(tmp_path, monkeypatch):
    images, maps = [], []
    monkeypatch.setattr(plots, "_draw_slice", lambda ax, volume, plane, z: images.append(z))
    monkeypatch.setattr(
        plots, "_upsampled_slice", lambda rgb, shape, z: maps.append(z) or np.zeros((2, 2, 3))
    )
    plot_feature_pca(tmp_path / "a.png", np.zeros((8, 8, 101)), np.zeros((3, 2, 2, 2)))
    assert images == maps and [round(z) for z in images] == [15, 32, 50, 68, 85]


def test_no_pyplot_state_is_touched(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_curves(tmp_path / "a.png", [{"epoch": 0, "loss": 1.0}])
    assert plt.get_fignums() == before

from pathlib import Path

import pytest

from utils.errors import InputError
from utils.files import make_folder, replacing


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with replacing(path) as file:
            file.write(text)
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write("half")
        raise OSError("full")
    assert path.read_text() == "two"


@pytest.mark.parametrize(
    ("place", "why"),
    [("a.txt", "a.txt is a file"), ("a.txt/b", "cannot be made: .*a.txt is a file")],
)
def test_a_folder_that_cannot_be_made_names_its_key(place, why, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=f"cache_dir: .*{why}; set cache_dir to a folder of yours"):
        make_folder(tmp_path / place, "cache_dir")
    make_folder(tmp_path / "b" / "c", "cache_dir")
    assert (tmp_path / "b" / "c").is_dir() and not any((tmp_path / "b" / "c").iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_a_folder_that_cannot_be_written_to():
    with pytest.raises(InputError, match="results_dir: /proc cannot be written to: "):
        make_folder("/proc", "results_dir")

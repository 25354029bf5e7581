import pytest

from utils.files import replacing


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with replacing(path) as file:
            file.write(text)
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write("half")
        raise OSError("full")
    assert path.read_text() == "two"

"""python -m data.clean: what no CSV uses is listed and removed, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from data.cache import VolumeCache
from data.clean.__main__ import main
from tests.data.test_cache import FORM, make_case
from utils.errors import InputError


def test_only_what_no_csv_uses_goes(tmp_path, capsys):
    folder, names = tmp_path / "cache", "abc"
    cases = [make_case(tmp_path, name, (12, 12, 12), seed=i) for i, name in enumerate(names)]
    cases.append(replace(cases[0], seg_path=None))
    cache = VolumeCache(folder, FORM)
    kept, *_, unmasked = [(cache.get(case), cache.path(case))[1] for case in cases]
    (folder / f"{'0' * 32}.b2nd").write_bytes(b"of an older version")
    (tmp_path / "a.csv").write_text("PatientID;path;seg_path;fold\np;a.nii;a_seg.nii;0\n")
    args = [str(folder), str(tmp_path / "a.csv")]
    assert main(args) == 0 and len([*folder.glob("*.b2nd")]) == 5
    assert "in use: 2 volumes" in capsys.readouterr().out
    main([*args, "--remove"])
    assert {*folder.glob("*.b2nd")} == {kept, unmasked}
    assert "3 removed" in capsys.readouterr().out


def test_masks_in_a_folder_are_in_use(tmp_path):
    case = make_case(tmp_path, "a", (12, 12, 12))
    (tmp_path / "masks").mkdir()
    Path(case.seg_path).rename(tmp_path / "masks" / "liver.nii")
    mask = str(tmp_path / "masks" / "liver.nii")
    cache, case = VolumeCache(tmp_path / "cache", FORM), replace(case, seg_path=mask)
    cache.get(case)
    (tmp_path / "a.csv").write_text("PatientID,path,seg_path,fold\np,a.nii,masks,0\n")
    main([str(tmp_path / "cache"), str(tmp_path / "a.csv"), "--remove"])
    assert cache.path(case).is_file()


def test_a_csv_whose_disk_is_absent_removes_nothing(tmp_path):
    cache, case = VolumeCache(tmp_path / "cache", FORM), make_case(tmp_path, "a", (12, 12, 12))
    cache.get(case)
    (tmp_path / "a.csv").write_text("PatientID,path,fold\np,disk/a.nii,0\n")
    with pytest.raises(InputError, match="path disk/a.nii: cannot be read"):
        main([str(tmp_path / "cache"), str(tmp_path / "a.csv"), "--remove"])
    assert cache.path(case).is_file()

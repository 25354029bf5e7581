"""Label values to classes and back, and what is said about a config that cannot be right."""

import itertools
import json

import numpy as np
import pytest

from utils.classes import IGNORE, Classes, class_problems, unpaired_sides

CLASSES = Classes.from_config({"liver": 5, "kidneys": [2, 30000], "spleen": [1]}, [9])


def test_label_values_become_indices_and_all_others_background():
    labels = np.int16([[0, 5, 2, 30000], [1, 9, 7, 32767], [-1, -32768, -9, -5]])
    index = CLASSES.to_index(labels)
    assert index.dtype == np.uint8 and index.shape == labels.shape
    assert index.tolist() == [[0, 1, 2, 2], [3, IGNORE, 0, 0], [0, 0, 0, 0]]
    assert [CLASSES.index_of(v) for v in labels[0]] == [0, 1, 2, 2]
    assert CLASSES.index_of(9) == IGNORE and CLASSES.index_of(7) == 0


def test_agrees_with_a_plain_loop_on_random_labels():
    labels = np.random.default_rng(0).integers(0, 40, (9, 8, 7)).astype(np.int16)
    classes = Classes.from_config({"a": [3, 17, 39], "b": 11, "c": [2, 5]}, [8, 13])
    want = np.zeros(labels.shape, int)
    for where in np.ndindex(labels.shape):
        for k, found in enumerate(([3, 17, 39], [11], [2, 5]), 1):
            if labels[where] in found:
                want[where] = k
        if labels[where] in (8, 13):
            want[where] = IGNORE
    assert np.array_equal(classes.to_index(labels), want)


def test_predictions_are_written_with_the_first_value_of_each_class():
    labels = CLASSES.to_labels(np.uint8([0, 1, 2, 3, IGNORE]))
    assert labels.dtype == np.int16 and labels.tolist() == [0, 5, 2, 1, 0]


def test_json_round_trip():
    assert Classes.from_dict(json.loads(json.dumps(CLASSES.to_dict()))) == CLASSES
    assert CLASSES.names == ("liver", "kidneys", "spleen") and CLASSES.num_outputs == 4


# ---- regions that overlap

BRATS = Classes.from_config({"WT": [1, 2, 4], "TC": [1, 4], "ET": 4}, [9])
CROSSED = Classes.from_config({"a": [1, 2], "b": [2, 3], "c": [5, 3, 1]})


def test_classes_overlap_only_where_a_value_is_in_two():
    assert BRATS.overlap and CROSSED.overlap and not CLASSES.overlap
    assert (BRATS.num_outputs, CLASSES.num_outputs) == (3, 4)
    assert np.array_equal(CLASSES.targets, np.eye(4))


def test_each_voxel_of_a_mask_is_in_the_regions_that_hold_its_value():
    labels = np.int16([0, 1, 2, 4, 9, 7])
    for classes in (BRATS, CROSSED):
        index = classes.to_index(labels)
        known = index != IGNORE
        for k, name in enumerate(classes.names):
            inside = np.isin(labels, classes.values[k])
            assert np.array_equal(np.isin(index, classes.indices_of(name)), inside)
            assert np.array_equal(classes.targets[index[known], k], inside[known])
    assert BRATS.meanings() == {2: ["WT"], 1: ["WT", "TC"], 4: ["WT", "TC", "ET"]}
    # what is written comes back as the same regions
    for classes in (BRATS, CROSSED, CLASSES):
        index = np.arange(len(classes.parts) + 1)
        assert np.array_equal(classes.to_index(classes.to_labels(index)), index)


def walk(classes, predicted):
    node = 0
    for table, side in zip(classes.decision(), predicted[::-1], strict=True):
        node = table[node, int(side)]
    return node


def test_predicted_regions_become_the_value_that_stands_for_them():
    for classes in (BRATS, CROSSED):
        for index, of in enumerate(classes.members):
            assert walk(classes, of) == index


def test_where_no_value_stands_for_the_regions_later_classes_are_believed():
    for classes in (BRATS, CROSSED):
        for predicted in itertools.product((False, True), repeat=3):
            agree = [tuple(of == predicted)[::-1] for of in classes.members]
            assert walk(classes, predicted) == agree.index(max(agree))


def test_nested_regions_are_written_as_by_nnunets_regions_class_order():
    for predicted in itertools.product((False, True), repeat=3):
        painted = 0
        for label, side in zip((2, 1, 4), predicted, strict=True):  # regions_class_order
            painted = label if side else painted
        assert BRATS.to_labels(walk(BRATS, predicted)) == painted


def test_mirroring_swaps_regions_of_two_sides():
    sides = {"lungs": [1, 2, 3, 4], "left": [1, 3], "right": [2, 4], "nodule": [3, 4]}
    classes = Classes.from_config(sides)
    table = classes.mirror_table([["left", "right"]])
    swapped = classes.to_labels(table[classes.to_index(np.int16([0, 1, 2, 3, 4]))])
    assert swapped.tolist() == [0, 2, 1, 4, 3]
    assert classes.channels([["left", "right"]]) == [[1, 2]]
    assert CLASSES.channels([["liver", "spleen"]]) == [[1, 3]]


def test_mirroring_swaps_pairs_and_nothing_else():
    table = CLASSES.mirror_table([["liver", "spleen"]])
    assert table[:4].tolist() == [0, 3, 2, 1] and table[IGNORE] == IGNORE
    assert np.array_equal(table[table], np.arange(256))
    assert np.array_equal(CLASSES.mirror_table([]), np.arange(256))


@pytest.mark.parametrize(
    "classes, ignore, pairs, key, what",
    [
        ({}, [], [], "classes", "empty"),
        ({"a": [1, 2], "b": [2, 1]}, [], [], "classes.b", "has the label values of classes.a"),
        ({"a": 1, "b": [1, 2]}, [2], [], "ignore_labels", "2 is in classes.b too"),
        ({"a": [1, 3], "l": [1, 4], "r": 5}, [], [["l", "r"]], "augment.mirror_pairs", "swapped"),
        ({"a": [1, 1]}, [], [], "classes.a", "1 is twice"),
        ({"a": 1}, [1], [], "ignore_labels", "1 is in classes.a too"),
        ({"a": 0}, [], [], "classes.a", "0 is always background"),
        ({"a": 1}, [0], [], "ignore_labels", "0 is always background"),
        ({"a": -3}, [], [], "classes.a", "-3: label values are 1 to 32767"),
        ({"a": 40000}, [], [], "classes.a", "40000"),
        ({"a": []}, [], [], "classes.a", "no label value"),
        ({f"c{i}": i for i in range(1, 256)}, [], [], "classes", "at most 254"),
        ({"kidney_left": 1}, [], [["kidney_left", "kidney_lefd"]], "augment.mirror_pairs", "near"),
        ({"a": 1, "b": 2}, [], [["a", "a"]], "augment.mirror_pairs", "two different"),
        ({"a": 1, "b": 2, "c": 3}, [], [["a", "b"], ["b", "c"]], "augment.mirror_pairs", "b is in"),
    ],
)
def test_impossible_classes_are_named(classes, ignore, pairs, key, what):
    found = list(class_problems(classes, ignore, pairs))
    assert any(k == key and what in text for k, text in found), found


def test_possible_classes_are_not():
    assert not list(class_problems({"a": 1, "b": [7, 900]}, [3, 4], [["a", "b"]]))
    assert not list(class_problems({f"c{i}": i for i in range(1, 255)}))


def test_classes_of_one_side_that_no_pair_swaps_are_found():
    names = ["left_kidney", "right_kidney", "Lung L", "bright", "cleft", "gluteus_rt", "liver", "r"]
    names += ["vertebra_L1", "rib_left_3", "T1 R2"]
    pairs = [["left_kidney", "right_kidney"]]
    assert unpaired_sides(names, pairs) == ["Lung L", "gluteus_rt", "r", "rib_left_3"]

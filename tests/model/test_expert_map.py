"""The expert map: its three sources, and every way in which it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bzstream.model.errors import BadExpertMap
from bzstream.model.expert_map import check_map, even_split, load_map


def write_task(folder: Path, name: str, config: object, assignment: object) -> None:
    task = folder / name
    task.mkdir(parents=True)
    (task / "config.yaml").write_text(yaml.safe_dump(config))
    (task / "expert_assignment.json").write_text(json.dumps(assignment))


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 99), st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 12))
def test_an_even_split_covers_every_expert_once(layers: dict[int, int], groups: int) -> None:
    if min(layers.values()) < groups:
        with pytest.raises(BadExpertMap, match="too few"):
            even_split(layers, groups)
        return
    split = even_split(layers, groups)
    check_map(split, layers)
    for layer, count in layers.items():
        assert [index for group in range(groups) for index in split[group][layer]] == list(range(count))
        sizes = {len(split[group][layer]) for group in range(groups)}
        assert max(sizes) - min(sizes) <= 1


def test_an_even_split_into_nothing_is_refused() -> None:
    with pytest.raises(BadExpertMap, match="--groups"):
        even_split({0: 4}, 0)


def test_a_json_map_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"7": {"0": [3, 1], "12": [2]}, "0": {"0": [0], "12": [1, 0]}}')
    assert load_map(path) == {7: {0: (3, 1), 12: (2,)}, 0: {0: (0,), 12: (1, 0)}}


def test_the_subnets_folder_of_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "math", {"group_id": 4, "data": {"x": 1}}, {"0": [[1, 9], [0, 5]], "2": [[0, 1]]})
    write_task(tmp_path, "law", {"expert_group_id": 0}, {"0": [[8, 3], [9, 2]], "2": [[0, 0]]})
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "README.md").write_text("x")
    assert load_map(tmp_path) == {4: {0: (5, 9), 2: (1,)}, 0: {0: (3, 2), 2: (0,)}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "more than 64 deep"),
        ('{"a": {}}', "no group number"),
        ('{"01": {}}', "no group number"),
        ('{"-1": {}}', "no group number"),
        ('{"1234567890": {}}', "no group number"),
        ('{"0": []}', "not a map from layers"),
        ('{"0": {"x": [1]}}', "no layer number"),
        ('{"0": {"0": 1}}', "not a list of expert numbers"),
        ('{"0": {"0": [true]}}', "not a list of expert numbers"),
        ('{"0": {"0": [1.0]}}', "not a list of expert numbers"),
        ('{"0": {"0": [[0, 1]]}}', "not a list of expert numbers"),
        ('{"0": {"0": [1]}, "0": {"0": [2]}}', "twice"),
        ('{"0": {"0": [1], "0": [2]}}', "twice"),
    ],
    ids=lambda value: value[:24],
)
def test_a_map_that_cannot_be_read_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(BadExpertMap, match=sentence):
        load_map(path)


def test_a_map_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadExpertMap, match="cannot be read"):
        load_map(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(BadExpertMap, match="not UTF-8"):
        load_map(tmp_path / "binary")


@pytest.mark.parametrize(
    ("experts", "sentence"),
    [
        ({}, "no groups"),
        ({0: {0: (0,)}}, "lacks layer 1"),
        ({0: {0: (0,), 1: (0,), 2: (0,)}}, "names layer 2"),
        ({0: {0: (), 1: (0,)}}, "no experts in layer 0"),
        ({0: {0: (4,), 1: (0,)}}, "experts 0 to 3"),
        ({0: {0: (-1,), 1: (0,)}}, "experts 0 to 3"),
        ({0: {0: (1, 2, 1), 1: (0,)}}, "expert 1 of layer 0 twice"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(experts: dict[int, dict[int, tuple[int, ...]]], sentence: str) -> None:
    with pytest.raises(BadExpertMap, match=sentence):
        check_map(experts, {0: 4, 1: 4})


def test_a_folder_that_is_no_folder_of_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadExpertMap, match="no task folders"):
        load_map(tmp_path)
    write_task(tmp_path, "a", {"group_id": 1}, {"0": [[0, 0]]})
    write_task(tmp_path, "b", {"group_id": 1}, {"0": [[0, 0]]})
    with pytest.raises(BadExpertMap, match="the tasks a and b"):
        load_map(tmp_path)
    (tmp_path / "b" / "expert_assignment.json").unlink()
    with pytest.raises(BadExpertMap, match=r"has no expert_assignment\.json"):
        load_map(tmp_path)
    (tmp_path / "b" / "config.yaml").unlink()
    assert load_map(tmp_path) == {1: {0: (0,)}}


@pytest.mark.parametrize("config", [{}, {"group_id": "1"}, {"group_id": -1}, {"group_id": True}, [1], None])
def test_a_task_without_a_number_is_refused(tmp_path: Path, config: object) -> None:
    write_task(tmp_path, "a", config, {"0": [[0, 0]]})
    with pytest.raises(BadExpertMap, match="no group_id"):
        load_map(tmp_path)


def test_a_task_with_broken_yaml_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {}, {"0": [[0, 0]]})
    (tmp_path / "a" / "config.yaml").write_text("a: [")
    with pytest.raises(BadExpertMap, match="not valid YAML"):
        load_map(tmp_path)


@pytest.mark.parametrize("pairs", [[1], [[1]], [[1, 2, 3]], [["0", 1]], {"0": 1}, [[0, True]]])
def test_an_assignment_of_another_form_is_refused(tmp_path: Path, pairs: object) -> None:
    write_task(tmp_path, "a", {"group_id": 1}, {"0": pairs})
    with pytest.raises(BadExpertMap, match=r"\[local index, original index\]"):
        load_map(tmp_path)


def test_one_local_index_for_two_experts_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "a", {"group_id": 1}, {"0": [[0, 1], [0, 2]]})
    with pytest.raises(BadExpertMap, match="one local index to two experts"):
        load_map(tmp_path)

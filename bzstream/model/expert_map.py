"""The expert map: which experts of which layer each group trains, and in which order.

A map comes as one JSON file `{"<group>": {"<layer>": [original index, …]}}`, as the subnet's own folder of tasks
(`<task>/config.yaml` with `group_id`, `<task>/expert_assignment.json` with `{"<layer>": [[local index, original
index], …]}`), or as an even split. The order of a layer's list, or of its local indices, is the order of the rows in
the group's slice. An expert may be in several groups (its bytes are then stored in each) but only once in one group;
an expert of no group goes to the unit of ungrouped experts, which only the full model contains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from bzstream.model.errors import BadExpertMap
from bzstream.util.files import read_small_file
from bzstream.util.strict_json import JsonError, parse_json_object

__all__ = ["ExpertMap", "check_map", "even_split", "load_map"]

ExpertMap = Mapping[int, Mapping[int, tuple[int, ...]]]
"""Group -> layer -> original indices in local order."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
"""A group's or layer's number as text: what the X-Expert-Group header accepts."""

MAX_MAP = 64 * 1024 * 1024
"""Bytes of a map file. That of Qwen3-VL-30B-A3B (128 experts in 48 layers) has 30 KB."""


def even_split(layers: Mapping[int, int], groups: int) -> ExpertMap:
    """`groups` runs of neighbouring experts in every layer, whose sizes differ by one at most.

    `layers` is layer -> number of experts. Raises BadExpertMap when a layer has fewer experts than groups.
    """
    if groups < 1:
        raise BadExpertMap(f"{groups} groups make no sense; --groups takes a number from 1 on")
    for layer, count in layers.items():
        if count < groups:
            raise BadExpertMap(f"layer {layer} has {count} experts, too few for {groups} groups")
    return {
        group: {n: tuple(range(group * e // groups, (group + 1) * e // groups)) for n, e in layers.items()}
        for group in range(groups)
    }


def load_map(path: Path) -> ExpertMap:
    """The map in a JSON file or in a folder of tasks. Raises BadExpertMap with the place of what is wrong."""
    if path.is_dir():
        return _load_folder(path)
    document = _read_json(path)
    groups: dict[int, dict[int, tuple[int, ...]]] = {}
    for group, layers in document.items():
        place = f"group {group} of {path}"
        if not _NUMBER.fullmatch(group):
            raise BadExpertMap(f"{group!r} in {path} is no group number")
        if not isinstance(layers, dict):
            raise BadExpertMap(f"{place} is not a map from layers to lists of experts")
        groups[int(group)] = {
            _layer(layer, place): _indices(e, f"layer {layer} of {place}") for layer, e in layers.items()
        }
    return groups


def check_map(experts: ExpertMap, layers: Mapping[int, int]) -> None:
    """Raise BadExpertMap unless the map fits the checkpoint: `layers` is layer -> number of experts."""
    if not experts:
        raise BadExpertMap("the expert map has no groups")
    for group, assigned in sorted(experts.items()):
        missing, unknown = sorted(layers.keys() - assigned.keys()), sorted(assigned.keys() - layers.keys())
        if unknown:
            raise BadExpertMap(f"group {group} names layer {unknown[0]}, which has no experts in the checkpoint")
        if missing:
            raise BadExpertMap(f"group {group} lacks layer {missing[0]}; every layer with experts needs its list")
        for layer, indices in sorted(assigned.items()):
            if not indices:
                raise BadExpertMap(f"group {group} has no experts in layer {layer}")
            outside = [index for index in indices if not 0 <= index < layers[layer]]
            if outside:
                raise BadExpertMap(
                    f"group {group} names expert {outside[0]} of layer {layer}, "
                    f"which has experts 0 to {layers[layer] - 1}"
                )
            if len(set(indices)) != len(indices):
                twice = next(index for index in indices if indices.count(index) > 1)
                raise BadExpertMap(f"group {group} names expert {twice} of layer {layer} twice")


def _load_folder(folder: Path) -> ExpertMap:
    groups: dict[int, dict[int, tuple[int, ...]]] = {}
    origin: dict[int, str] = {}
    for task in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        config, assignment = task / "config.yaml", task / "expert_assignment.json"
        if not config.exists() and not assignment.exists():
            continue
        for needed in (config, assignment):
            if not needed.exists():
                raise BadExpertMap(f"the task folder {task} has no {needed.name}")
        group = _group_id(config)
        if group in groups:
            raise BadExpertMap(f"the tasks {origin[group]} and {task.name} in {folder} both have the group_id {group}")
        origin[group] = task.name
        groups[group] = {
            _layer(layer, str(assignment)): _pairs(pairs, f"layer {layer} of {assignment}")
            for layer, pairs in _read_json(assignment).items()
        }
    if not groups:
        raise BadExpertMap(f"{folder} has no task folders with config.yaml and expert_assignment.json")
    return groups


def _group_id(path: Path) -> int:
    try:
        document = yaml.safe_load(_read(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadExpertMap(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    # Older releases of the subnet's code call it expert_group_id.
    value = document.get("group_id", document.get("expert_group_id")) if isinstance(document, dict) else None
    if type(value) is not int or not _NUMBER.fullmatch(str(value)):
        raise BadExpertMap(f"{path} has no group_id that is a whole number from 0 to 999999999")
    return value


def _read(path: Path) -> bytes:
    try:
        return read_small_file(path, MAX_MAP)
    except OSError as error:
        raise BadExpertMap(f"the expert map {path} cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, object]:
    try:
        return parse_json_object(_read(path))
    except JsonError as error:
        raise BadExpertMap(f"the expert map {path} cannot be used: {error}") from None


def _layer(text: str, place: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise BadExpertMap(f"{text!r} in {place} is no layer number")
    return int(text)


def _indices(value: object, place: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise BadExpertMap(f"{place} is not a list of expert numbers")
    return tuple(value)


def _pairs(value: object, place: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(item) is int for item in pair) for pair in value
    ):
        raise BadExpertMap(f"{place} is not a list of [local index, original index]")
    local = [pair[0] for pair in value]
    if len(set(local)) != len(local):
        raise BadExpertMap(f"{place} gives one local index to two experts")
    return tuple(original for _, original in sorted(value))

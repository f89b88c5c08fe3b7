"""Run by `test_resident.py`: load a model of some 190 MB, swap two submissions in, and report what memory it took."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bzstream.evaluation.baseline import BaselineModel
from bzstream.evaluation.reading.layout import check_layout
from bzstream.evaluation.scoring.resident_model import ResidentModel
from bzstream.model import open_snapshot, publish

LAYERS, EXPERTS, WIDTH = 4, 8, 1700


class Wide(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        layers = []
        for _ in range(LAYERS):
            blocks = [{"up_proj": torch.nn.Linear(WIDTH, WIDTH, bias=False)} for _ in range(EXPERTS)]
            experts = torch.nn.ModuleList([torch.nn.ModuleDict(block) for block in blocks])
            layers.append(torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": experts})}))
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros((*tokens.shape, 16))


def build(config: dict[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        module = Wide()
    return module.to_empty(device="cpu")


def resident_kb() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main(place: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(LAYERS) for e in range(EXPERTS)]
    tensors = {name: torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16) for name in names}
    (place / "checkpoint").mkdir()
    save_file(tensors, place / "checkpoint" / "model.safetensors", {"format": "pt"})
    (place / "checkpoint" / "config.json").write_text('{"vocab_size": 16}')
    publish(place / "checkpoint", place / "store", block=1, version="a", groups=4)
    del tensors
    published = BaselineModel(open_snapshot(place / "store" / "snapshots" / "a"))
    part = published.group(1)
    file = os.open(place / "store" / "current" / "group-1.safetensors", os.O_RDONLY)
    locations = check_layout(lambda n, at: os.pread(file, n, at), os.fstat(file).st_size, part.specs)
    torch.ones(8) @ torch.ones(8)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_kb()
    model = ResidentModel(published, device="cpu", factory="__main__:build")
    for _ in range(3):
        staged, following = model.stage(file, locations, 1), model.stage(file, locations, 1)
        with model.swapped_in(staged):
            model.window_losses(np.zeros((2, 8), np.int64), batch=1)
        staged.close()
        following.close()
    assert model.differing() == []
    grown = (resident_kb() - before) * 1024
    print(json.dumps({"grown": grown, "model": published.full.nbytes, "slice": part.nbytes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

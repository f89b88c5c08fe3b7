"""Loads the model once. For each submission it swaps the submitted expert weights in, scores, and swaps them out again.

Scoring by `deepcopy` and `load_state_dict` moves the whole model for every submission and holds it twice. Here a
submission only touches its own slice. Its bytes go into a *staging buffer* (on CUDA through pinned memory and a side
stream, while the submission before it is being scored). To swap it in, each binding of the staging buffer is
*exchanged* with its region of a parameter. Exchange is its own inverse: while the submission is swapped in, the staging
buffer holds exactly the baseline's bytes, and swapping it out is exchanging once more. So the model needs no second
copy, not even of the slice, and the restored baseline is the baseline, bit for bit.

If anything fails between the two exchanges (out of memory, a device error, cancellation), it is no longer certain which
bytes lie where; then the group is read again from the snapshot's files. If even that fails, `is_baseline` stays False
and the owner of the model loads it anew.

Memory: the model, two staging buffers (one swapped in, one being filled), one expert's row of scratch, and, while other
multiples of a submission's change are measured, a copy of its slice.
All methods that touch parameters belong to one thread at a time; `stage` may run in another beside it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bzstream.evaluation.baseline import BaselineModel, UnitTensors, read_into
from bzstream.evaluation.reading.specs import TensorLocation, TensorSpec, item_size
from bzstream.evaluation.rejection_codes import EvaluationError, Failure, ModelClosed, Refusal
from bzstream.evaluation.scoring.bindings import Binding, bind, missing
from bzstream.evaluation.scoring.copies import SKETCH
from bzstream.evaluation.scoring.losses import derive
from bzstream.evaluation.scoring.module import build_module, ignored_names, map_errors, state_of, torch_dtype
from bzstream.evaluation.scoring.staging import CHUNK, fill, layout, memory_of
from bzstream.model.naming import expert_name

__all__ = ["ResidentModel", "Staged"]

_TILE = 1 << 20
"""Elements that one draw of sketch signs covers; further tiles turn and flip it."""


class _Buffer(NamedTuple):
    """One staging buffer on the model's device, and on CUDA the event after which it may be overwritten."""

    data: torch.Tensor
    free: Any


class Staged:
    """A submission's slice in the published dtypes, ready to be swapped in. `close()` gives its buffer back."""

    def __init__(self, group: int, views: Sequence[torch.Tensor], weights: str, give_back: Callable[[], None]) -> None:
        self.group = group
        self.views = views
        self.weights = weights
        """BLAKE3 over the tensors' bytes in the published dtype and order, 64 hex digits."""
        self._give_back: Callable[[], None] | None = give_back

    def close(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            self.views = ()
            give_back()


class ResidentModel:
    """A published model version on one device.

    Raises EvaluationError from the constructor when the config's model and the published tensors do not fit.
    """

    def __init__(self, baseline: BaselineModel, *, device: str, factory: str | None = None) -> None:
        """`device`: a torch device; `factory`: `module:function` that takes the config (a dict) and gives the model."""
        self.baseline = baseline
        self.device = torch.device(device)
        self.is_baseline = False
        """Whether every parameter is the baseline's (outside of `swapped_in`)."""
        self._cuda = self.device.type == "cuda"
        full = baseline.full
        with map_errors():
            self.module = build_module(baseline.config, _expert_dtype(baseline), self.device, factory)
            self._regions = {name: value.detach() for name, value in state_of(self.module).items()}
            shapes = {name: tuple(value.shape) for name, value in self._regions.items()}
            ignored = ignored_names(self.module)
            self._full = bind(full.specs, shapes, square_is_native=baseline.square_is_native, ignored=ignored)
            unfilled = missing(self._full, shapes)
            if unfilled:
                raise EvaluationError(
                    f"version {baseline.version} does not fill the model's parameter {unfilled[0]!r} (and "
                    f"{len(unfilled) - 1} more); check config.json or set evaluation.model"
                )
            self._shapes = shapes
            self._bindings: dict[int, list[Binding]] = {}
            self._buffers: list[_Buffer] = []
            self._free: list[_Buffer] = []
            self._changed = threading.Condition()
            self._closed = False
            self._pinned: torch.Tensor | None = None
            self._pinned_lock = threading.Lock()
            self._side = torch.cuda.Stream(self.device) if self._cuda else None
            self._load(full, self._full)
        self.is_baseline = True

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows, by its config or its input embedding."""
        config = self.baseline.config
        for section in (config, config.get("text_config") or {}):
            if type(section.get("vocab_size")) is int:
                return int(section["vocab_size"])
        embedding: Any = getattr(self.module, "get_input_embeddings", lambda: None)()
        if embedding is None:
            raise EvaluationError("config.json does not say how many tokens the model knows; add vocab_size")
        return int(embedding.weight.shape[0])

    # ---- Loading and checking -----------------------------------------------------------------------------------

    def _load(self, unit: UnitTensors, bindings: Sequence[Binding]) -> None:
        """Copy published bytes into the parameters, one by one, through at most `CHUNK` of host memory."""
        for binding, region, offset, spec in self._walk(unit, bindings):
            dtype = torch_dtype(spec.dtype)
            direct = region.device.type == "cpu" and region.dtype == dtype
            if direct and region.is_contiguous():
                read_into(unit.payload, offset, memory_of(region))
            elif region.is_contiguous() and not binding.transposed:
                flat = region.view(-1)
                step = CHUNK // item_size(spec.dtype)
                for start in range(0, flat.numel(), step):
                    aim = flat[start : start + step]
                    host = torch.empty(aim.numel(), dtype=dtype, pin_memory=self._cuda)
                    read_into(unit.payload, offset + start * item_size(spec.dtype), memory_of(host))
                    aim.copy_(host)
            else:
                host = torch.empty(region.shape, dtype=dtype, pin_memory=self._cuda)
                read_into(unit.payload, offset, memory_of(host))
                region.copy_(host)

    def differing(self) -> list[str]:
        """Parameters that are not the published ones bit for bit; [] when all are. Reads the whole model."""
        found: dict[str, None] = {}
        for binding, region, offset, spec in self._walk(self.baseline.full, self._full):
            host = torch.empty(region.shape, dtype=torch_dtype(spec.dtype))
            read_into(self.baseline.full.payload, offset, memory_of(host))
            expected = host.to(region.dtype).contiguous()
            if bytes(memory_of(region.cpu().contiguous())) != bytes(memory_of(expected)):
                found[binding.parameter] = None
        return list(found)

    def _walk(
        self, unit: UnitTensors, bindings: Sequence[Binding]
    ) -> Iterator[tuple[Binding, torch.Tensor, int, TensorSpec]]:
        """Each binding with its region of the parameter (in the published orientation) and its byte in the payload."""
        for binding in bindings:
            spec = unit.specs[binding.tensor]
            row = 0 if binding.row is None else binding.row * (spec.nbytes // max(1, spec.shape[0]))
            yield binding, self._region(binding), unit.offsets[binding.tensor] + row, spec

    def _region(self, binding: Binding) -> torch.Tensor:
        region = self._regions[binding.parameter]
        if binding.expert is not None:
            region = region[binding.expert]
        if binding.span is not None:
            region = region[binding.span[0] : binding.span[1]]
        return region.transpose(-1, -2) if binding.transposed else region

    def bindings(self, group: int) -> list[Binding]:
        """Where a group's slice lies. Raises EvaluationError when it does not fit, Failure `unknown_group`."""
        if group not in self._bindings:
            unit = self.baseline.group(group)
            bindings = bind(unit.specs, self._shapes, rows=unit.rows, square_is_native=self.baseline.square_is_native)
            for binding in bindings:
                spec = unit.specs[binding.tensor]
                if self._regions[binding.parameter].dtype != torch_dtype(spec.dtype):
                    raise EvaluationError(f"{spec.name!r} is published as {spec.dtype}, unlike the model's parameter")
            self._bindings[group] = bindings
        return self._bindings[group]

    # ---- Staging ------------------------------------------------------------------------------------------------

    def stage(self, fd: int, locations: Sequence[TensorLocation], group: int) -> Staged:
        """Read a checked file's tensors into a staging buffer, cast to the published dtypes. Blocks for a buffer.

        `locations`: as `sandbox.Reader.read` returned it for this group. Raises Failure.
        """
        unit = self.baseline.group(group)
        self.bindings(group)
        starts, size = layout(unit.specs)
        with map_errors():
            buffer = self._take(size)
            try:
                if self._cuda:
                    weights = self._stage_cuda(fd, locations, unit, starts, size, buffer)
                else:
                    weights = fill(fd, locations, unit.specs, starts, buffer.data)
                views = [
                    buffer.data[start : start + spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
                    for start, spec in zip(starts, unit.specs, strict=True)
                ]
                return Staged(group, views, weights, lambda: self._release(buffer))
            except BaseException:
                self._release(buffer)
                raise

    def _stage_cuda(
        self,
        fd: int,
        locations: Sequence[TensorLocation],
        unit: UnitTensors,
        starts: Sequence[int],
        size: int,
        buffer: _Buffer,
    ) -> str:
        with self._pinned_lock:
            if self._pinned is None or self._pinned.numel() < size:
                self._pinned = None  # the old one goes before the new one comes
                self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            weights = fill(fd, locations, unit.specs, starts, self._pinned)
            assert self._side is not None
            with torch.cuda.stream(self._side):
                self._side.wait_event(buffer.free)  # the exchange that still reads this buffer
                buffer.data[:size].copy_(self._pinned[:size], non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._side)
            arrived.synchronize()  # this thread waits; the one that scores goes on
            return weights

    def _take(self, size: int) -> _Buffer:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or len(self._buffers) < 2)
            if self._closed:
                raise ModelClosed
            buffer = self._free.pop() if self._free else None
            if buffer is None or buffer.data.numel() < size:
                if buffer is not None:
                    self._buffers = [b for b in self._buffers if b is not buffer]
                    buffer = None  # the smaller one goes first
                event = torch.cuda.Event() if self._cuda else None
                buffer = _Buffer(torch.empty(size, dtype=torch.uint8, device=self.device), event)
                self._buffers.append(buffer)
            return buffer

    def _release(self, buffer: _Buffer) -> None:
        if self._cuda:
            buffer.free.record(torch.cuda.current_stream(self.device))
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    # ---- Swapping in and scoring ----------------------------------------------------------------------------------

    @contextmanager
    def swapped_in(self, staged: Staged) -> Iterator[Callable[[float], None]]:
        """The model has the submission's experts inside the block, and the baseline's before and after it.

        Gives a function that replaces them by `baseline + step * (submission - baseline)`, worked out in float32, for a
        step that is given. The staging buffer holds the baseline's bytes all the while, so the baseline comes back
        exactly. From the first call on a copy of the submission's slice is held as well. After a call, or when the
        block raises, `staged` cannot be used again: its buffer may hold either side's bytes.
        """
        if not self.is_baseline:
            raise Failure("internal_error", "the model is not the baseline; load it again")
        bindings = self.bindings(staged.group)
        self.is_baseline = False
        try:
            with map_errors(), torch.inference_mode():
                self._exchange(bindings, staged)
                submitted: list[torch.Tensor] = []
                yield partial(self._move, bindings, staged, submitted)
                self._exchange(bindings, staged)
                if self._cuda:
                    torch.cuda.current_stream(self.device).synchronize()
            self.is_baseline = True
        finally:
            if not self.is_baseline:
                self.restore(staged.group)

    def restore(self, group: int) -> None:
        """Read a group again from the snapshot's files. Raises EvaluationError, Failure."""
        with map_errors(), torch.inference_mode():
            if self._cuda:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            self._load(self.baseline.group(group), self.bindings(group))
        self.is_baseline = True

    def _exchange(self, bindings: Sequence[Binding], staged: Staged) -> None:
        scratch: torch.Tensor | None = None
        for binding in bindings:
            region = self._region(binding)
            view = staged.views[binding.tensor]
            theirs = view if binding.row is None else view[binding.row]
            if scratch is None or scratch.dtype != region.dtype or scratch.numel() < region.numel():
                scratch = torch.empty(region.numel(), dtype=region.dtype, device=self.device)
            kept = scratch[: region.numel()].view(region.shape)
            kept.copy_(region)
            region.copy_(theirs)
            theirs.copy_(kept)

    def _move(self, bindings: Sequence[Binding], staged: Staged, submitted: list[torch.Tensor], step: float) -> None:
        """While a submission is swapped in: `step` times its change. `submitted`: its weights; [] before the first."""
        if not submitted:
            submitted += [self._region(binding).clone() for binding in bindings]
        for binding, whole in zip(bindings, submitted, strict=True):
            view = staged.views[binding.tensor]
            base = (view if binding.row is None else view[binding.row]).float()
            self._region(binding).copy_(base + step * (whole.float() - base))

    def window_losses(
        self,
        windows: NDArray[np.int64],
        *,
        batch: int,
        tokens_out: NDArray[np.float32] | None = None,
        deadline: float = float("inf"),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[float]:
        """Each window's summed cross-entropy in float32, [windows, length] -> one number a window.

        Ends early, with the number that is not finite as its last, when a batch has one. `tokens_out`: [windows,
        length - 1], where to put each token's loss. `deadline`: monotonic seconds. Raises Failure `evaluation_timeout`,
        `out_of_memory`, `device_error`; InterruptedError on cancellation.
        """
        losses: list[float] = []
        with map_errors(), torch.inference_mode():
            for start in range(0, len(windows), batch):
                if cancelled():
                    raise InterruptedError
                if time.monotonic() > deadline:
                    raise Failure("evaluation_timeout", "scoring took too long")
                tokens = torch.from_numpy(windows[start : start + batch]).to(self.device)
                logits = self.logits(tokens)
                each = [_cross_entropy(row, ids) for row, ids in zip(logits, tokens, strict=True)]
                # Summed in float64, window by window, so that the order of additions is always the same.
                found = torch.stack([window.double().sum() for window in each]).tolist()
                losses += found
                if tokens_out is not None:
                    tokens_out[start : start + len(each)] = torch.stack(each).cpu().numpy()
                if not all(np.isfinite(found)):
                    return losses
        return losses

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, vocabulary]"""
        output = self.module(tokens) if self._plain else self.module(input_ids=tokens, use_cache=False)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        assert isinstance(logits, torch.Tensor)
        return logits

    @property
    def _plain(self) -> bool:
        """Whether the module is the factory's and takes tokens alone."""
        return not hasattr(self.module, "config")

    def sketch(self, staged: Staged, seed: str) -> tuple[float, ...]:
        """The count sketch (`scoring`) of the submission's change to the baseline; `SKETCH` finite numbers.

        Call it while the submission is *not* swapped in. Raises Refusal `non_finite` when the change is not
        finite in float32.
        """
        raw = np.random.Philox(key=derive("bzstream-sketch-1", seed) % (1 << 128)).random_raw(_TILE // 64)
        bits = np.unpackbits(np.asarray(raw, "<u8").view(np.uint8)).astype(np.float32)
        with map_errors(), torch.inference_mode():
            signs = torch.from_numpy(np.tile(bits * 2 - 1, 2)).to(self.device)
            total = torch.zeros(SKETCH, dtype=torch.float64, device=self.device)
            tile = 0
            for binding in self.bindings(staged.group):
                view = staged.views[binding.tensor]
                theirs = view if binding.row is None else view[binding.row]
                ours = self._region(binding)
                if not ours.dtype.is_floating_point:
                    continue
                # Both in the published order of elements, so that the model's layout does not matter.
                left, right = theirs.reshape(-1), ours.reshape(-1)
                for start in range(0, left.numel(), _TILE):
                    change = left[start : start + _TILE].float() - right[start : start + _TILE].float()
                    draw = derive("bzstream-sketch-tile-1", seed, tile)
                    turn = draw % _TILE
                    change *= signs[turn : turn + change.numel()]
                    short = -change.numel() % SKETCH
                    folded = torch.nn.functional.pad(change, (0, short)).view(-1, SKETCH).sum(0, dtype=torch.float64)
                    total += folded if (draw >> 128) & 1 else -folded
                    tile += 1
            sketch = tuple(float(value) for value in total.float().tolist())
        if not all(map(math.isfinite, sketch)):
            raise Refusal("non_finite", "the change to the published weights is not finite")
        return sketch

    def close(self) -> None:
        """Free the model's memory; the object is of no use after, and `stage` raises ModelClosed."""
        self.is_baseline = False
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._regions.clear()
        self._buffers.clear()
        self._free.clear()
        self._pinned = None
        self.module = torch.nn.Module()
        if self._cuda:
            torch.cuda.empty_cache()


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The loss of each predicted token of one window, float32."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def _expert_dtype(baseline: BaselineModel) -> torch.dtype:
    """The dtype of the experts is the model's: they are what is trained and exchanged."""
    for spec in baseline.full.specs:
        if expert_name(spec.name) is not None and torch_dtype(spec.dtype).is_floating_point:
            return torch_dtype(spec.dtype)
    raise EvaluationError(f"version {baseline.version} has no expert tensors of a floating-point dtype")

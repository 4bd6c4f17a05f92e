"""The ledger: per-rank statistics of every path, their columns, and the buffer in which they are summed.

Every kernel emits one row per rank with the columns below. They leave the backward as the gradient of a float32 leaf,
``proxy_probe``, whose ``.grad`` is a slice of :attr:`Ledger.pending`; so nothing is counted without a backward, and
activation checkpointing counts once. Nothing outside this file knows the index of a column.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from heterolora_kernels.undo import Undo, put_back, values_of

#: Name of each column and its degree in the loss scale: a loss multiplied by S multiplies the column by S ** degree.
COLUMN_DEGREES: dict[str, int] = {
    "hidden_sq": 0,
    "grad_A_sq": 2,
    "grad_B_sq": 2,
    "abs_A_grad_A": 1,
    "abs_B_grad_B": 1,
    "gate_grad": 1,
    "taylor_sq": 2,
}
COLUMNS: tuple[str, ...] = tuple(COLUMN_DEGREES)
NUM_COLUMNS = len(COLUMNS)


def row_statistics(lora_A: Tensor, lora_B: Tensor, grad_A: Tensor, grad_B: Tensor,
                   hidden_sq: Tensor | None = None, gate_grad: Tensor | None = None) -> Tensor:
    """The ledger's rows of one path, [r, columns].

    Row j holds sums over row j of ``lora_A`` and column j of ``lora_B``.

    Args:
        lora_A, grad_A: [r, K].
        lora_B, grad_B: [N, r].
        hidden_sq: [r], 0 where it is not known (it cannot be derived from gradients).
        gate_grad: [r]; derived as <A_j, grad_A_j> where it is not given, which is the same number.
    """
    a_grad_a = lora_A * grad_A
    b_grad_b = lora_B * grad_B
    values = {
        "hidden_sq": a_grad_a.new_zeros(a_grad_a.shape[0]) if hidden_sq is None else hidden_sq,
        "grad_A_sq": grad_A.square().sum(1),
        "grad_B_sq": grad_B.square().sum(0),
        "abs_A_grad_A": a_grad_a.abs().sum(1),
        "abs_B_grad_B": b_grad_b.abs().sum(0),
        "gate_grad": a_grad_a.sum(1) if gate_grad is None else gate_grad,
        "taylor_sq": a_grad_a.square().sum(1) + b_grad_b.square().sum(0),
    }
    return torch.stack([values[name] for name in COLUMNS], dim=1)


def columns_of(rows: Tensor) -> dict[str, Tensor]:
    """Split [..., columns] into one tensor per column."""
    return {name: rows[..., index] for index, name in enumerate(COLUMNS)}


class Collector:
    """One reader of the ledger: the sums since it was opened or zeroed.

    ``raw`` holds what backward passes left and nothing has judged yet; ``committed`` what belongs to a step that was
    taken, unscaled. A reader that never commits (``collect_statistics``) reads ``raw``. ``is_open``: whether more will come.
    ``is_fresh``: whether a backward ran since the last commit; several optimizers step once after each.
    """

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self.is_open = True
        self.is_fresh = False
        self.raw = ledger.new_rows()
        self.committed = ledger.new_rows()
        self._steps = self.raw.new_zeros(())

    @property
    def steps(self) -> int:
        """How many commits were kept; copied from the device when asked."""
        return int(self._steps)

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps.fill_(value)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that is summed."""
        return self.raw, self.committed, self._steps

    def move(self, device: torch.device) -> None:
        """Sum on another device from now on."""
        self.raw, self.committed, self._steps = (t.to(device) for t in self.tensors)

    def commit(self, loss_scale: float = 1.0) -> None:
        """Move ``raw`` to ``committed``, divided by the loss scale; drop it whole if any of it is not finite.

        Decided on the device: no step of training waits for it.
        """
        self._ledger.flush()
        if not self.is_fresh:
            # Another optimizer of the same step.
            return
        self.is_fresh = False
        finite = torch.isfinite(self.raw).all()
        factors = self.raw.new_tensor([float(loss_scale) ** -COLUMN_DEGREES[name] for name in COLUMNS])
        self.committed += torch.where(finite, self.raw * factors, 0.0)
        self._steps += finite
        self.raw.zero_()

    def discard(self) -> None:
        """Forget what has not been committed: the step it belongs to was not taken."""
        self._ledger.flush()
        self.is_fresh = False
        self.raw.zero_()

    def zero_(self) -> Collector:
        """Forget everything collected so far."""
        self._ledger.flush()
        for tensor in self.tensors:
            tensor.zero_()
        return self

    def table(self) -> dict[str, dict[str, Tensor]]:
        """``{path: {column: float32 [r]}}``: the raw sums since entry or the last :meth:`zero_`."""
        self._ledger.flush()
        return self._ledger.split(self.raw)


class Ledger:
    """One flat float32 buffer for a model, a row per rank of every path.

    Args:
        ranks: ``{path: r}`` in the order in which the paths' rows lie.
    """

    def __init__(self, ranks: Mapping[str, int]):
        self._slices: dict[str, slice] = {}
        first = 0
        for path, rank in ranks.items():
            self._slices[path] = slice(first, first + rank)
            first += rank
        self._num_rows = first
        self._pending: dict[torch.device, Tensor] = {}
        self._probes: list[tuple[weakref.ref, Tensor]] = []
        self._collectors: list[Collector] = []
        self._flushed: list[int] = []

    def __getstate__(self) -> dict:
        # A copy of a model has no readers yet, and its probes are bound anew at its first forward.
        return {**self.__dict__, "_pending": {}, "_probes": [], "_collectors": [], "_flushed": []}

    @property
    def collecting(self) -> bool:
        """Whether somebody reads: with no reader the columns and the inactive rows are not computed."""
        return bool(self._collectors)

    def new_rows(self) -> Tensor:
        """Zeros of the buffer's shape [R, columns], on the first device that collected (the CPU before that)."""
        device = next(iter(self._pending), torch.device("cpu"))
        return torch.zeros(self._num_rows, NUM_COLUMNS, dtype=torch.float32, device=device)

    def bind(self, first_path: str, rows: int, device: torch.device) -> Tensor:
        """The slice of the buffer on ``device`` into which the gradient of a probe with ``rows`` rows is summed."""
        if device not in self._pending:
            self._pending[device] = torch.zeros(self._num_rows, NUM_COLUMNS, dtype=torch.float32, device=device)
        first = self._slices[first_path].start
        return self._pending[device][first:first + rows]

    def attach(self, probe: Tensor, first_path: str) -> None:
        """Let the gradient of ``probe`` [rows, columns] be summed into the buffer on its device."""
        probe.grad = self.bind(first_path, probe.shape[0], probe.device)
        self._probes = [(ref, rows) for ref, rows in self._probes if ref() is not None]
        self._probes.append((weakref.ref(probe), probe.grad))

    def _reattach(self) -> bool:
        """Bring back probes whose ``.grad`` was replaced: ``backward(create_graph=True)`` sums out of place.

        Returns:
            Whether one was.
        """
        found = False
        for ref, rows in self._probes:
            probe = ref()
            if probe is None or (probe.grad is not None and probe.grad.data_ptr() == rows.data_ptr()):
                continue
            if probe.grad is not None:
                rows.copy_(probe.grad.detach())
                found = True
            probe.grad = rows
        return found

    def rows_by_path(self, rows: Tensor) -> dict[str, Tensor]:
        """[R, columns] as ``{path: [r, columns]}``, views."""
        return {path: rows[where] for path, where in self._slices.items()}

    def split(self, rows: Tensor) -> dict[str, dict[str, Tensor]]:
        """[R, columns] as ``{path: {column: [r]}}``, copied."""
        return {path: {name: value.clone() for name, value in columns_of(part).items()}
                for path, part in self.rows_by_path(rows).items()}

    def flush(self) -> None:
        """Hand what backward passes left to every reader, and zero the buffer."""
        replaced = self._reattach()
        if replaced or self._versions() != self._flushed:
            for collector in self._collectors:
                collector.is_fresh = True
        for pending in self._pending.values():
            for collector in self._collectors:
                if collector.raw.device != pending.device and len(self._pending) == 1:
                    collector.move(pending.device)
                collector.raw += pending.to(collector.raw.device)
            pending.zero_()
        self._flushed = self._versions()

    def _versions(self) -> list[int]:
        """Changes with every backward that summed into the buffer; a slice of it counts as the whole."""
        return [pending._version for pending in self._pending.values()]

    def open(self) -> Collector:
        """Begin to collect; close with :meth:`close`."""
        self.flush()
        collector = Collector(self)
        self._collectors.append(collector)
        return collector

    def close(self, collector: Collector) -> None:
        """Stop; what the reader has stays readable."""
        self.flush()
        self.drop(collector)

    def drop(self, collector: Collector) -> None:
        """Stop for a reader whom nobody reads any more.

        A finalizer may call it: it touches no tensor, for the garbage collector runs under whatever mode is active, and
        leaves alone the list that somebody may be walking.
        """
        collector.is_open = False
        self._collectors = [other for other in self._collectors if other.is_open]

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """What happens in the block is seen by the readers opened in it alone: all others keep what they had."""
        self.flush()
        others = self._collectors

        def undo() -> None:
            self.flush()
            inside = [collector for collector in self._collectors if collector not in others]
            self._collectors = [collector for collector in (*others, *inside) if collector.is_open]

        with put_back(undo):
            self._collectors = []
            yield

    def undo_point(self) -> Undo:
        """Makes the readers those of now, with the sums that they have now."""
        if self._collectors:
            self.flush()
        collectors = list(self._collectors)
        fresh = [collector.is_fresh for collector in collectors]
        values = values_of(tensor for collector in collectors for tensor in collector.tensors)

        def undo() -> None:
            self._collectors = list(collectors)
            for collector, was_fresh in zip(collectors, fresh):
                collector.is_open, collector.is_fresh = True, was_fresh
            values()
        return undo

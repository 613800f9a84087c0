"""Batches: requests that are queued for the same model are inferred together, and none waits for others to come.

A worker runs each request for such a model in a greenlet. When it is ready to infer, the greenlet parks, and the worker
runs the next queued request. Then the oldest parked one of the highest priority is inferred, together with those whose
dims other than the first are the same, and each gets its rows. Outside of a worker's loop, every request is inferred
alone.

The inputs of a batch are copied once, into buffers that are kept. The outputs are views on the model's memory, which
the next inference overwrites; each greenlet has sent or copied its own before that.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numpy.typing import NDArray

from ovms_rest.errors import DeadlineError, InvalidRequestError, LoadError
from ovms_rest.log import log
from ovms_rest.protocol.buffers import allocate
from ovms_rest.protocol.datatypes import DATATYPES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.protocol.words import count_of
from ovms_rest.shared_memory.inference_notes import Note
from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.context import current_context, within

# The inputs and outputs of a batch have at most this many bytes together, unless it is of one request.
MAX_BATCH_BYTES = 64 * 2**20

Arrays = Mapping[str, Array]
Tensors = Mapping[str, Tensor]


class Member:
    """A request that is parked."""

    __slots__ = (
        *("arrays", "batch_rows", "batching", "began_ns", "executed_rows", "greenlet", "is_follower", "kind", "order"),
        *("note", "record", "rows", "since_ns", "size", "spent_ns", "trace"),
    )

    def __init__(self, batching: "Batching", arrays: Arrays, rows: int, record: InferenceRecord | None) -> None:
        self.batching = batching
        self.record = record
        # 1 is first; what has none is last.
        self.order = (record.priority if record is not None else 0) or math.inf
        self.arrays = arrays
        self.rows = rows
        self.kind = [array.shape[1:] for array in arrays.values()]
        self.size = sum(array.nbytes for array in arrays.values()) + rows * batching.output_bytes
        self.greenlet = getcurrent()
        self.since_ns = time.monotonic_ns()
        # About its inference: nanoseconds, whether another member accounts for it, and if not, its rows.
        self.spent_ns, self.is_follower, self.executed_rows = 0, True, 0
        self.began_ns, self.batch_rows = 0, 0  # when it began, and the rows of all its members
        self.trace = current_context()
        self.note = parking.note

    def run(self) -> None:
        """Note that the request runs from now on, for when this process dies of it."""
        if self.note is not None:
            self.note.run()

    def park(self) -> None:
        """Note that the request does not run until `run` is called."""
        if self.note is not None:
            self.note.park()


class Parking:
    """The parked requests of a process, oldest first; only the thread that called `begin` parks any."""

    def __init__(self) -> None:
        self._hub: greenlet | None = None
        self.members: deque[Member] = deque()
        self._size = 0  # of all members
        self.note: Note | None = None  # of the request that runs, set where it begins

    def begin(self) -> None:
        """Let requests park from now on; the caller's greenlet is the one that runs and resumes them."""
        self._hub = getcurrent()

    def can_park(self) -> bool:
        """Return whether the caller was started by `run`."""
        return self._hub is not None and getcurrent().parent is self._hub

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function in a greenlet of its own until it returns or parks; it must not raise exceptions."""
        greenlet(function, self._hub).switch(*arguments)

    def park(self, member: Member) -> Tensors:
        """Wait, in the caller's greenlet, for the outputs. Raises what the inference raised."""
        assert self._hub is not None
        self.members.append(member)
        self._size += member.size
        member.park()
        outcome: Tensors | Exception = self._hub.switch()
        self.note = member.note
        member.run()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def is_full(self) -> bool:
        """Return whether the parked requests take so much memory that no other one should be run before them."""
        return self._size > MAX_BATCH_BYTES

    def is_first(self, priority: int) -> bool:
        """Return whether a parked request comes before a queued one of that priority, 0 for none."""
        return any(member.order <= (priority or math.inf) for member in self.members)

    def infer_next(self) -> None:
        """Infer the batch of the next parked request, and resume its requests one after another."""
        self._refuse_late()
        if not self.members:
            return
        first = min(self.members, key=_order)  # the oldest of equal ones
        batch, others, rows, size = list[Member](), list[Member](), 0, 0
        for member in (first, *(each for each in self.members if each is not first)):
            if member is first or (
                member.batching is first.batching
                and member.kind == first.kind
                and rows
                and member.rows
                and rows + member.rows <= first.batching.limit
                and size + member.size <= MAX_BATCH_BYTES
            ):
                batch.append(member)
                rows, size = rows + member.rows, size + member.size
            else:
                others.append(member)
        self.members.clear()
        self.members.extend(others)
        self._size -= size
        for member, outcome in first.batching.infer_together(batch, rows):
            member.greenlet.switch(outcome)

    def _refuse_late(self) -> None:
        """Resume the requests whose timeout has passed while others were inferred."""
        for member in list(self.members):
            try:
                if member.record is not None:
                    member.record.check_deadline()
            except DeadlineError as error:
                self.members.remove(member)
                self._size -= member.size
                member.greenlet.switch(error)


def _order(member: Member) -> float:
    return member.order


parking = Parking()


class Batching:
    """The batches of one model: at most `limit` rows each. `infer` infers arrays immediately, in one inference."""

    def __init__(self, metadata: ModelMetadata, limit: int, infer: Callable[[Arrays], Tensors]) -> None:
        """Raises LoadError if a tensor's first dim cannot be that of a batch of `limit` rows."""
        for what, tensors in (("input", metadata.inputs), ("output", metadata.outputs)):
            for tensor in tensors.values():
                _check_first_dim(tensor, what, limit)
        self.limit = limit
        self.output_bytes = sum(map(_row_bytes, metadata.outputs.values()))  # of a row, as far as it is known
        self._label = f"model {metadata.name!r} version {metadata.version}"
        self._infer = infer
        self._buffers: dict[str, NDArray[Any]] = {}
        self._has_warned = False

    def infer(self, arrays: Arrays, record: InferenceRecord | None) -> Tensors:
        """Infer, together with others if there are any.

        Raises InvalidRequestError for more rows than `limit`, or inputs with different numbers of rows, and whatever
        the inference raises.
        """
        counts = {name: array.shape[0] for name, array in arrays.items()}
        rows = next(iter(counts.values()))
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
            raise InvalidRequestError(f"{self._label} has the batch in the first dim of every input; got rows: {found}")
        if rows > self.limit:
            raise InvalidRequestError(
                f"the request has {count_of(rows, 'row')}, at most {self.limit} are allowed, max_batch_size of "
                f"{self._label}"
            )
        is_suspect = parking.note is not None and bool(parking.note.suspicions)
        if is_suspect or not parking.can_park():
            if record is not None:
                record.executed_rows = rows
            return self._infer(arrays)
        member = Member(self, arrays, rows, record)
        try:
            return parking.park(member)
        finally:
            if record is not None:
                record.parked_ns += time.monotonic_ns() - member.since_ns - member.spent_ns
                record.executed_rows, record.is_follower = member.executed_rows, member.is_follower
                record.began_ns, record.batch_rows = member.began_ns, member.batch_rows

    def infer_together(self, batch: Sequence[Member], rows: int) -> "Iterator[tuple[Member, Tensors | Exception]]":
        """Infer a batch of that many rows, and yield what each member gets.

        If the batch fails, each is inferred alone, so that only the request at fault fails.
        """
        tensors = self._infer_batch(batch, rows) if len(batch) > 1 else None
        if tensors is None:
            for member in batch:
                yield member, self._infer_alone(member)
            return
        begin = 0
        for member in batch:
            end = begin + member.rows
            yield member, {name: tensor._replace(array=_rows(tensor.array, begin, end)) for name, tensor in tensors}
            begin = end

    def _infer_batch(self, batch: Sequence[Member], rows: int) -> list[tuple[str, Tensor]] | None:
        """Return the outputs of a batch, None if it fails."""
        began = time.monotonic_ns()
        for member in batch:
            member.run()
        try:
            tensors = self._infer({name: self._gather(name, batch, rows) for name in batch[0].arrays})
        except Exception as error:  # found again, with the request at fault
            log.debug("a batch of %s failed, its requests are inferred one by one: %s", self._label, error)
            return None
        finally:
            for member in batch:
                member.park()
        for name, tensor in tensors.items():
            if tensor.shape[:1] != (rows,):
                if not self._has_warned:
                    self._has_warned = True
                    log.warning(
                        "%s cannot infer batches, its requests are inferred one by one: output %r has the shape %s "
                        "for %s",
                        *(self._label, name, list(tensor.shape), count_of(rows, "row")),
                    )
                return None
        for member in batch:
            member.spent_ns = time.monotonic_ns() - began
            member.began_ns, member.batch_rows = began, rows
        batch[0].executed_rows, batch[0].is_follower = rows, False
        return list(tensors.items())

    def _infer_alone(self, member: Member) -> Tensors | Exception:
        began = time.monotonic_ns()
        member.executed_rows, member.is_follower = member.rows, False
        member.began_ns, member.batch_rows = began, member.rows
        member.run()
        try:
            with within(member.trace):
                return self._infer(member.arrays)
        except Exception as error:
            return error
        finally:
            member.park()
            member.spent_ns = time.monotonic_ns() - began

    def _gather(self, name: str, batch: Sequence[Member], rows: int) -> Array:
        """Return the rows of an input of all members in one array."""
        arrays: list[Any] = [member.arrays[name] for member in batch]
        if isinstance(arrays[0], BytesArray):
            return _concatenate(arrays)
        shape, dtype = arrays[0].shape[1:], arrays[0].dtype
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[1:] != shape or len(buffer) < rows:
            row_bytes = arrays[0].nbytes // len(arrays[0])
            count = self.limit if self.limit * row_bytes <= MAX_BATCH_BYTES else rows
            memory = allocate(count * row_bytes)
            buffer = self._buffers[name] = np.frombuffer(memory, dtype).reshape(count, *shape)
        begin = 0
        for array in arrays:
            buffer[begin : begin + len(array)] = array
            begin += len(array)
        return buffer[:rows]


def _concatenate(arrays: Sequence[BytesArray]) -> BytesArray:
    """Return the rows of all arrays in one."""
    offsets = np.cumsum([0, *(len(array.symbols) for array in arrays[:-1])], dtype=np.int32)
    begins, ends = (
        np.concatenate([getattr(array, name) + offset for array, offset in zip(arrays, offsets, strict=True)])
        for name in ("begins", "ends")
    )
    return BytesArray(begins, ends, np.concatenate([array.symbols for array in arrays]))


def _rows(array: Array, begin: int, end: int) -> Array:
    """Return some rows of an array, without a copy."""
    if isinstance(array, BytesArray):
        return BytesArray(array.begins[begin:end], array.ends[begin:end], array.symbols)
    return array[begin:end]


def _row_bytes(tensor: TensorMetadata) -> int:
    """Return the bytes of a row of a tensor, 0 if they vary."""
    row, sizes = DATATYPES.get(tensor.datatype), [dim.size for dim in (tensor.dims or ())[1:]]
    return 0 if row is None or None in sizes else math.prod(size or 0 for size in sizes) * row.size


def _check_first_dim(tensor: TensorMetadata, what: str, limit: int) -> None:
    """Raise LoadError unless the first dim of a tensor can be that of any batch; outputs may lack shapes."""
    if tensor.dims is None and what == "output":
        return
    dim = tensor.dims[0] if tensor.dims else None
    if dim is None or dim.low > 1 or (dim.high is not None and dim.high < limit):
        advice = "" if dim is None else f'; "batch_size": "1:{limit}" makes it dynamic where the model allows that'
        raise LoadError(
            f"max_batch_size: {what} {tensor.name!r} has the shape {tensor.describe_shape()}, and its first dim cannot "
            f"be 1 to {limit} rows{advice}"
        )

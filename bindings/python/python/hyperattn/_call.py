"""The arrays of one call as the structs of the C header, and the call on the device where they are."""

import contextlib
from types import TracebackType
from typing import Any

from . import _cuda
from ._arrays import Shape, View, arrays_of
from ._dlpack import CPU
from ._library import check, ffi, lib

# Positions of batch, heads, sequence and head_dim in the shape of an array.
_AXES = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3)}

_DTYPES = {
    "float32": lib.HYPERATTN_DTYPE_F32,
    "float16": lib.HYPERATTN_DTYPE_F16,
    "bfloat16": lib.HYPERATTN_DTYPE_BF16,
}


def axes(layout: str) -> tuple[int, int, int, int]:
    """Where batch, heads, sequence and head_dim are."""
    if layout not in _AXES:
        raise ValueError(f"layout={layout!r}: one of {', '.join(_AXES)}")
    return _AXES[layout]


class Call:
    """One call: every array is on the device of the first and, where it came through DLPack, lent until the end.

    stream: a CUstream, or None for the current stream of the library that the first array is from.
    """

    def __init__(self, name: str, first: Any, layout: str, stream: int | None = None) -> None:
        self.layout = layout
        self.axes = axes(layout)
        self.arrays = arrays_of(name, first)
        self.device = self.arrays.device(name, first)
        if stream is not None and self.device == CPU:
            raise ValueError(f"stream={stream}: {name} is on the CPU")
        self.stream = self.arrays.stream(self.device, stream)
        self._first, self._name = first, name
        self._lent = contextlib.ExitStack()
        self._kept: list[Any] = []

    def __enter__(self) -> "Call":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lent.close()

    def keep(self, struct: Any) -> Any:
        """`struct`, kept until the end of the call, for a pointer to it."""
        self._kept.append(struct)
        return struct

    def view(self, name: str, array: Any, written: bool = False) -> View:
        """An array's memory."""
        arrays = arrays_of(name, array)
        device = arrays.device(name, array)
        if device != self.device:
            raise ValueError(f"{name}: on {device}, but {self._name} is on {self.device}")
        return arrays.view(name, array, written=written, stream=self.stream, lent=self._lent)

    def pointer(self, name: str, array: Any, dtype: str, c_type: str) -> Any:
        """The address of a contiguous array of integers."""
        view = self.view(name, array)
        if view.dtype != dtype:
            raise TypeError(f"{name}: dtype {view.dtype}, not {dtype}")
        expected = 1
        for extent, stride in zip(reversed(view.shape), reversed(view.strides)):
            if extent > 1 and stride != expected:
                raise ValueError(f"{name}: must be contiguous")
            expected *= extent
        return ffi.cast(c_type, view.pointer)

    def fill(
        self,
        tensor: Any,
        name: str,
        array: Any,
        *,
        written: bool = False,
        per_row: bool = False,
        per_head: bool = False,
    ) -> None:
        """Makes the hyperattn_tensor show the array: 4 dimensions, or 3 for a single batch item.

        per_row: the array has no head_dim (a log-sum-exp). per_head: neither that nor a sequence (an error).
        """
        view = self._floats(name, array, written)
        missing = 2 if per_head else 1 if per_row else 0
        shape, strides = (*view.shape, *(1,) * missing), (*view.strides, *(1,) * missing)
        if len(shape) == 3:
            shape, strides = (1, *shape), (0, *strides)
        if len(shape) != 4:
            wanted = f"{self.layout} or {self.layout[1:]}"
            raise ValueError(f"{name}: {len(view.shape)} dimensions, not {wanted[:-1] if per_row else wanted}")
        order = (0, 1, 2, 3) if per_head else self.axes
        _fill(tensor, view, [shape[axis] for axis in order], [strides[axis] for axis in order])

    def fill_mask(self, tensor: Any, name: str, array: Any) -> None:
        """Makes the hyperattn_tensor show a mask [batch, heads, n_q, n_k], whatever the layout of the others.

        Leading dimensions may be missing: they are 1 then.
        """
        view = self._floats(name, array, written=False)
        missing = 4 - len(view.shape)
        if missing < 0:
            raise ValueError(f"{name}: {len(view.shape)} dimensions, more than 4")
        _fill(tensor, view, [*(1,) * missing, *view.shape], [*(0,) * missing, *view.strides])

    def _floats(self, name: str, array: Any, written: bool) -> View:
        view = self.view(name, array, written)
        if view.dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {view.dtype}, not one of {', '.join(_DTYPES)}")
        return view

    def empty(self, shape: Shape, dtype: str | None = None) -> Any:
        """A new array like the first one, with its element type or with `dtype`; `result` makes it the caller's."""
        return self.arrays.empty(shape, self._first, dtype)

    def result(self, array: Any) -> Any:
        """What the caller gets for an array of `empty`, after the call."""
        return self.arrays.result(array, self._first)

    def run(self, function: str, threads: int, params: Any, tensors: Any, *gradients: Any) -> None:
        """hyperattn_{function}(), or hyperattn_cuda_{function}() on the stream."""
        if self.device == CPU:
            check(getattr(lib, f"hyperattn_{function}")(params, tensors, *gradients, cpu_execution(threads)))
            return
        need = ffi.new("hyperattn_layout *")
        check(getattr(lib, f"hyperattn_cuda_{function}_workspace")(params, tensors, need))
        execution = ffi.new("hyperattn_cuda_exec *")
        execution.struct_size = ffi.sizeof("hyperattn_cuda_exec")
        execution.stream = ffi.cast("struct CUstream_st *", self.stream)
        # It is freed before the stream has passed the call, for the stream's later work: allocators order that.
        workspace = self.arrays.workspace(need.size, self.device)
        if workspace is not None:
            execution.workspace.data = ffi.cast("void *", workspace.data_ptr())
            execution.workspace.size = need.size
        with _cuda.current_context(self.device.index):
            check(getattr(lib, f"hyperattn_cuda_{function}")(params, tensors, *gradients, execution))

    def on_cpu_only(self, function: str) -> None:
        """Refuses what the library has for the CPU only."""
        if self.device != CPU:
            raise NotImplementedError(f"{function} is for the CPU, but {self._name} is on {self.device}")


def _fill(tensor: Any, view: View, shape: list[int], strides: list[int]) -> None:
    tensor.data = ffi.cast("void *", view.pointer)
    tensor.dtype = _DTYPES[view.dtype]
    tensor.shape = shape
    tensor.stride = strides


def cpu_execution(threads: int) -> Any:
    """A hyperattn_cpu_exec."""
    execution = ffi.new("hyperattn_cpu_exec *")
    execution.struct_size = ffi.sizeof("hyperattn_cpu_exec")
    execution.num_threads = threads
    return execution

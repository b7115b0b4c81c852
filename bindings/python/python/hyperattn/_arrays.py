"""NumPy arrays and PyTorch tensors as views that the library reads and writes in place.

Neither library is imported here before a caller has: an argument of its type cannot exist otherwise.
"""

import sys
from typing import Any, Protocol

from ._library import ffi, lib

# Positions of batch, heads, sequence and head_dim in the shape of an array.
_AXES = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3)}

Shape = tuple[int, ...]


class Arrays(Protocol):
    """What differs between NumPy and PyTorch. Strides count elements."""

    def strides(self, array: Any) -> Shape: ...
    def pointer(self, array: Any) -> int: ...
    def dtype_name(self, array: Any) -> str: ...
    def check(self, name: str, array: Any, written: bool) -> None: ...
    def empty(self, shape: Shape, like: Any, float32: bool) -> Any: ...


class _Numpy:
    def strides(self, array: Any) -> Shape:
        return tuple(stride // array.itemsize for stride in array.strides)

    def pointer(self, array: Any) -> int:
        return array.ctypes.data

    def dtype_name(self, array: Any) -> str:
        return array.dtype.name

    def check(self, name: str, array: Any, written: bool) -> None:
        if not array.dtype.isnative:
            raise TypeError(f"{name}: bytes of dtype {array.dtype} are swapped")
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(f"{name}: strides {array.strides} are not multiples of {array.itemsize} bytes")
        if written and not array.flags.writeable:
            raise ValueError(f"{name}: the array is read-only")

    def empty(self, shape: Shape, like: Any, float32: bool) -> Any:
        numpy = sys.modules["numpy"]
        return numpy.empty(shape, dtype=numpy.float32 if float32 else like.dtype)


class _Torch:
    def strides(self, array: Any) -> Shape:
        return array.stride()

    def pointer(self, array: Any) -> int:
        return array.data_ptr()

    def dtype_name(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def check(self, name: str, array: Any, written: bool) -> None:
        torch = sys.modules["torch"]
        if array.device.type != "cpu":
            raise ValueError(f"{name}: on device {array.device}, not on the CPU")
        if array.layout is not torch.strided:
            raise ValueError(f"{name}: layout {array.layout}, not strided")
        if array.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, but there is no backward pass; use torch.no_grad()")

    def empty(self, shape: Shape, like: Any, float32: bool) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=torch.float32 if float32 else like.dtype)


def arrays_of(name: str, array: Any) -> Arrays:
    """The adapter for an array's type."""
    for module, type_name, adapter in (("numpy", "ndarray", _Numpy()), ("torch", "Tensor", _Torch())):
        if module in sys.modules and isinstance(array, getattr(sys.modules[module], type_name)):
            return adapter
    raise TypeError(f"{name}: a NumPy array or a PyTorch tensor is needed, not {type(array).__name__}")


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


def pointer_of(name: str, array: Any, dtype: str, c_type: str) -> Any:
    """The address of a contiguous integer array."""
    arrays = arrays_of(name, array)
    if arrays.dtype_name(array) != dtype:
        raise TypeError(f"{name}: dtype {arrays.dtype_name(array)}, not {dtype}")
    arrays.check(name, array, written=False)
    expected = 1
    for extent, stride in zip(reversed(array.shape), reversed(arrays.strides(array))):
        if extent > 1 and stride != expected:
            raise ValueError(f"{name}: must be contiguous")
        expected *= extent
    return ffi.cast(c_type, arrays.pointer(array))


def fill_view(view: Any, name: str, array: Any, layout: str, *, written: bool = False, per_row: bool = False) -> None:
    """Makes the hyperattn_tensor `view` show the array: 4 dimensions, or 3 for a single batch item.

    per_row: the array has no head_dim (a log-sum-exp).
    """
    arrays = arrays_of(name, array)
    arrays.check(name, array, written)
    dtype = arrays.dtype_name(array)
    if dtype not in _DTYPES:
        raise TypeError(f"{name}: dtype {dtype}, not one of {', '.join(_DTYPES)}")
    shape, strides = tuple(array.shape), tuple(arrays.strides(array))
    if per_row:
        shape, strides = (*shape, 1), (*strides, 1)
    if len(shape) == 3:
        shape, strides = (1, *shape), (0, *strides)
    if len(shape) != 4:
        wanted = f"{layout} or {layout[1:]}"
        raise ValueError(f"{name}: {array.ndim} dimensions, not {wanted[:-1] if per_row else wanted}")
    view.data = ffi.cast("void *", arrays.pointer(array))
    view.dtype = _DTYPES[dtype]
    for position, axis in enumerate(axes(layout)):
        view.shape[position] = shape[axis]
        view.stride[position] = strides[axis]

"""Arrays of other libraries as views that the library reads and writes in place.

NumPy arrays and PyTorch tensors are read directly, so that what DLPack leaves out is there: bfloat16 in NumPy, tensors
that require a gradient. Everything else comes through DLPack. No library is imported here before a caller has: an
argument of its type cannot exist otherwise.
"""

import contextlib
import dataclasses
import sys
from typing import Any, Protocol

from ._dlpack import CPU, Device, Lent, Memory, SupportsDLPack, device_of

# Their arrays cannot be written to, and the capsules that they lend do not say so.
_IMMUTABLE = ("jax", "jaxlib")

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """Memory of an array. Strides count elements."""

    pointer: int
    dtype: str
    shape: Shape
    strides: Shape
    device: Device


class Arrays(Protocol):
    """What differs between the libraries that arrays come from."""

    def device(self, name: str, array: Any) -> Device: ...

    def stream(self, device: Device, wanted: int | None) -> int:
        """A CUstream: the wanted one, else the library's current one on the device."""

    def view(self, name: str, array: Any, *, written: bool, stream: int, lent: contextlib.ExitStack) -> View:
        """The memory, which is valid until `lent` is closed."""

    def empty(self, shape: Shape, like: Any, dtype: str | None) -> Any:
        """A new array where `like` is. dtype: that of `like`, or "float32"."""

    def result(self, array: Any, like: Any) -> Any:
        """What the caller gets for an array of `empty`, now that it is complete."""

    def workspace(self, size: int, device: Device) -> Any:
        """Device memory of the library's own allocator with `data_ptr()`, ordered on its current stream; or None."""


class _Numpy:
    def device(self, name: str, array: Any) -> Device:
        return CPU

    def stream(self, device: Device, wanted: int | None) -> int:
        return 0

    def view(self, name: str, array: Any, *, written: bool, stream: int, lent: contextlib.ExitStack) -> View:
        if not array.dtype.isnative:
            raise TypeError(f"{name}: bytes of dtype {array.dtype} are swapped")
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(f"{name}: strides {array.strides} are not multiples of {array.itemsize} bytes")
        if written and not array.flags.writeable:
            raise ValueError(f"{name}: the array is read-only")
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return View(array.ctypes.data, array.dtype.name, array.shape, strides, CPU)

    def empty(self, shape: Shape, like: Any, dtype: str | None) -> Any:
        return sys.modules["numpy"].empty(shape, dtype=dtype or like.dtype)

    def result(self, array: Any, like: Any) -> Any:
        return array

    def workspace(self, size: int, device: Device) -> Any:
        return None


class _Torch:
    def device(self, name: str, array: Any) -> Device:
        if array.device.type == "cpu":
            return CPU
        if array.device.type == "cuda" and sys.modules["torch"].version.cuda is not None:
            return Device("cuda", array.device.index)
        raise ValueError(f"{name}: on device {array.device}, neither the CPU nor CUDA")

    def stream(self, device: Device, wanted: int | None) -> int:
        if device == CPU:
            return 0
        if wanted is not None:
            # Its allocator must know which stream works on its memory.
            raise ValueError(f"stream={wanted}: PyTorch's current stream is taken; choose it with torch.cuda.stream()")
        stream: int = sys.modules["torch"].cuda.current_stream(device.index).cuda_stream
        return stream

    def view(self, name: str, array: Any, *, written: bool, stream: int, lent: contextlib.ExitStack) -> View:
        torch = sys.modules["torch"]
        if array.layout is not torch.strided:
            raise ValueError(f"{name}: layout {array.layout}, not strided")
        if array.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires a gradient, but this call is not recorded; "
                "use hyperattn.torch.forward, or torch.no_grad()"
            )
        dtype = str(array.dtype).removeprefix("torch.")
        return View(array.data_ptr(), dtype, tuple(array.shape), array.stride(), self.device(name, array))

    def empty(self, shape: Shape, like: Any, dtype: str | None) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype, device=like.device)

    def result(self, array: Any, like: Any) -> Any:
        return array

    def workspace(self, size: int, device: Device) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device.index}")


class _DLPack:
    """Any other library."""

    def device(self, name: str, array: Any) -> Device:
        return device_of(name, array)

    def stream(self, device: Device, wanted: int | None) -> int:
        return wanted or 0

    def view(self, name: str, array: Any, *, written: bool, stream: int, lent: contextlib.ExitStack) -> View:
        if isinstance(array, Memory):
            return View(array.pointer, array.dtype, array.shape, array.strides, CPU)
        if written and type(array).__module__.partition(".")[0] in _IMMUTABLE:
            raise ValueError(f"{name}: {type(array).__name__} cannot be written to")
        loan = Lent(name, array, written=written, stream=stream)
        lent.callback(loan.release)
        return View(loan.pointer, loan.dtype, loan.shape, loan.strides, loan.device)

    def empty(self, shape: Shape, like: Any, dtype: str | None) -> Any:
        if device_of("q", like) != CPU:
            raise TypeError(f"pass what to write to: results on CUDA are not made as {type(like).__name__}")
        if not hasattr(getattr(like, "__array_namespace__", dict)(), "from_dlpack"):
            raise TypeError(f"pass what to write to: {type(like).__name__} has no __array_namespace__ to make it")
        with contextlib.ExitStack() as lent:
            return Memory(shape, dtype or self.view("q", like, written=False, stream=0, lent=lent).dtype)

    def result(self, array: Any, like: Any) -> Any:
        return like.__array_namespace__().from_dlpack(array) if isinstance(array, Memory) else array

    def workspace(self, size: int, device: Device) -> Any:
        return None


class _Cupy(_DLPack):
    """Through DLPack, but for memory and the current stream."""

    def stream(self, device: Device, wanted: int | None) -> int:
        if wanted is not None:
            return wanted
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device.index):
            stream: int = cupy.cuda.get_current_stream().ptr
            return stream

    def empty(self, shape: Shape, like: Any, dtype: str | None) -> Any:
        with like.device:
            return sys.modules["cupy"].empty(shape, dtype=dtype or like.dtype)


def arrays_of(name: str, array: Any) -> Arrays:
    """The adapter for an array's type."""
    known: tuple[tuple[str, str, Arrays], ...] = (
        ("numpy", "ndarray", _Numpy()),
        ("torch", "Tensor", _Torch()),
        ("cupy", "ndarray", _Cupy()),
    )
    for module, type_name, adapter in known:
        if module in sys.modules and isinstance(array, getattr(sys.modules[module], type_name)):
            return adapter
    if isinstance(array, (SupportsDLPack, Memory)):
        return _DLPack()
    raise TypeError(f"{name}: an array with __dlpack__ is needed, not {type(array).__name__}")

"""DLPack: tensors of any library that has `__dlpack__`, and memory that goes out the same way.

The structs and the names of the capsules are those of DLPack 1.0, https://dmlc.github.io/dlpack/latest.
"""

import ctypes
import dataclasses
import math
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SupportsDLPack(Protocol):
    """What the calls take: an array that can be lent through DLPack (NumPy, PyTorch, JAX, CuPy and others)."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Device:
    """Where memory is: "cpu", or "cuda" and the number that the CUDA runtime gives the device."""

    kind: str
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)

# Kinds of device, by DLDeviceType. Pinned memory is the host's; managed memory is used where the device is.
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}
_DEVICE_CPU = 1
# (DLDataTypeCode, bits) of the element types that are used here.
_DTYPES = {
    (0, 32): "int32",
    (0, 64): "int64",
    (2, 16): "float16",
    (2, 32): "float32",
    (2, 64): "float64",
    (4, 16): "bfloat16",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_FLAG_READ_ONLY = 1
_FLAG_COPIED = 2
_VERSION = (1, 0)
# What JAX and others want of memory that they take without a copy.
_ALIGNMENT = 64


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A capsule keeps the pointer to its name: these stay as long as the process.
_NAME, _USED = b"dltensor", b"used_dltensor"
_NAME_VERSIONED, _USED_VERSIONED = b"dltensor_versioned", b"used_dltensor_versioned"


def _python_function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_capsule_new = _python_function("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_capsule_is_valid = _python_function("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = _python_function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_capsule_rename = _python_function("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)


def device_of(name: str, array: SupportsDLPack) -> Device:
    """The device of an array, which is not asked for its memory."""
    kind, index = (int(part) for part in array.__dlpack_device__())
    if kind not in _DEVICES:
        raise ValueError(f"{name}: on DLPack device type {kind}, neither the CPU nor CUDA")
    return CPU if _DEVICES[kind] == "cpu" else Device("cuda", index)


def _request(array: SupportsDLPack, device: Device, stream: int | None) -> Any:
    """A capsule, versioned where the array's library has that."""
    # DLPack's number for the legacy default stream is 1; on the CPU there is no stream.
    wanted = {} if device == CPU else {"stream": stream or 1}
    try:
        return array.__dlpack__(max_version=_VERSION, **wanted)
    except TypeError:
        # From before DLPack 1.0.
        return array.__dlpack__(**wanted)


class Lent:
    """A tensor that another library lends, from here to `release`."""

    def __init__(self, name: str, array: SupportsDLPack, *, written: bool, stream: int | None) -> None:
        self.device = device_of(name, array)
        capsule = _request(array, self.device, stream)
        managed: _Managed | _ManagedVersioned
        flags = 0
        if _capsule_is_valid(capsule, _NAME_VERSIONED):
            managed = _ManagedVersioned.from_address(_capsule_pointer(capsule, _NAME_VERSIONED))
            if managed.major > _VERSION[0]:
                # The capsule's own destructor takes it back.
                raise BufferError(f"{name}: DLPack {managed.major}.{managed.minor} is not known here")
            flags = managed.flags
            _capsule_rename(capsule, _USED_VERSIONED)
        elif _capsule_is_valid(capsule, _NAME):
            managed = _Managed.from_address(_capsule_pointer(capsule, _NAME))
            _capsule_rename(capsule, _USED)
        else:
            raise BufferError(f"{name}: __dlpack__ did not give an unused DLPack capsule")
        # From here on the tensor is ours to give back.
        self._managed: _Managed | _ManagedVersioned | None = managed
        try:
            self._read(name, managed.tensor, flags if written else 0)
        except BaseException:
            self.release()
            raise

    def _read(self, name: str, tensor: _Tensor, flags: int) -> None:
        if flags & _FLAG_READ_ONLY:
            raise ValueError(f"{name}: the array is read-only")
        if flags & _FLAG_COPIED:
            raise ValueError(f"{name}: the array's library lends a copy, what is written to it would be lost")
        dtype = _DTYPES.get((tensor.code, tensor.bits))
        if dtype is None or tensor.lanes != 1:
            raise TypeError(f"{name}: DLPack element type {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes")
        self.dtype = dtype
        self.shape = tuple(tensor.shape[: tensor.ndim])
        self.strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else packed_strides(self.shape)
        self.pointer = (tensor.data or 0) + tensor.byte_offset

    def release(self) -> None:
        """Gives the tensor back. May be called again."""
        managed, self._managed = self._managed, None
        if managed is not None and managed.deleter:
            _Deleter(managed.deleter)(ctypes.addressof(managed))


def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array without gaps whose last dimension is the innermost."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class Memory:
    """Memory of the CPU that one other library takes over through `__dlpack__`; freed here if none does.

    It is one block of the C library, which begins with the DLPack struct: the deleter of that struct is `free`, so
    that it can run at any time, in any thread and after the interpreter's end.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype, self.strides = shape, dtype, packed_strides(shape)
        libc = ctypes.CDLL(None)
        allocate = libc.aligned_alloc
        allocate.restype, allocate.argtypes = ctypes.c_void_p, (ctypes.c_size_t, ctypes.c_size_t)
        self._free = ctypes.cast(libc.free, ctypes.c_void_p).value or 0
        self._capsule: Any = None
        self._name = b""
        self._block: Any = None
        extents = ctypes.c_int64 * len(shape)
        # Room for the larger of the two structs, the shape, the strides; then the elements.
        self._shape_at = ctypes.sizeof(_ManagedVersioned)
        self._strides_at = self._shape_at + ctypes.sizeof(extents)
        data_at = _rounded_up(self._strides_at + ctypes.sizeof(extents))
        size = _rounded_up(data_at + math.prod(shape) * _CODES[dtype][1] // 8)
        self._block = allocate(_ALIGNMENT, size)
        if not self._block:
            raise MemoryError(f"{size} bytes for a result")
        extents.from_address(self._block + self._shape_at)[:] = list(self.shape)
        extents.from_address(self._block + self._strides_at)[:] = list(self.strides)
        self.pointer: int = self._block + data_at

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: Any) -> Any:
        """The capsule, which can be consumed once."""
        if self._capsule is not None:
            raise BufferError("this memory has been handed over")
        pointer = ctypes.POINTER(ctypes.c_int64)
        shape, strides = (ctypes.cast(self._block + at, pointer) for at in (self._shape_at, self._strides_at))
        code, bits = _CODES[self.dtype]
        tensor = _Tensor(self.pointer, _DEVICE_CPU, 0, len(self.shape), code, bits, 1, shape, strides, 0)
        managed: _Managed | _ManagedVersioned
        if max_version is None or max_version[0] < _VERSION[0]:
            managed, self._name = _Managed(tensor, None, self._free), _NAME
        else:
            managed, self._name = _ManagedVersioned(*_VERSION, None, self._free, 0, tensor), _NAME_VERSIONED
        ctypes.memmove(self._block, ctypes.byref(managed), ctypes.sizeof(managed))
        self._capsule = _capsule_new(self._block, self._name, None)
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DEVICE_CPU, 0

    def __del__(self) -> None:
        if self._capsule is None or _capsule_is_valid(self._capsule, self._name):
            _Deleter(self._free)(self._block)


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

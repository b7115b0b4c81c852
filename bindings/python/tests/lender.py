"""Arrays that have nothing but DLPack, with every field of what they lend in the test's hands."""

import ctypes

import numpy

from hyperattn import _dlpack

_CODES = {"float16": (2, 16), "float32": (2, 32), "bfloat16": (4, 16), "int32": (0, 32), "int64": (0, 64)}


class Lender:
    """A NumPy array, lent. `returned` counts the calls of the deleter, `streams` what was asked for.

    versioned: which capsule; None for a library that does not know max_version. The other fields are the struct's.
    """

    def __init__(
        self,
        array,
        *,
        versioned=True,
        dtype=None,
        device=(1, 0),
        flags=0,
        major=1,
        lanes=1,
        byte_offset=0,
        strides=True,
        deleter=True,
    ):
        self.array, self.shape, self.ndim = array, array.shape, array.ndim
        self.versioned, self.where = versioned, device
        self.returned, self.streams, self.kept = 0, [], []
        code, bits = _CODES[dtype or array.dtype.name]
        self.fields = dict(code=code, bits=bits, lanes=lanes, byte_offset=byte_offset)
        self.flags, self.major, self.with_strides, self.with_deleter = flags, major, strides, deleter

    def _give_back(self, _):
        self.returned += 1

    def _tensor(self):
        extents = ctypes.c_int64 * self.ndim
        shape = extents(*self.shape)
        strides = extents(*(stride // self.array.itemsize for stride in self.array.strides))
        self.kept += [shape, strides]
        pointer = ctypes.POINTER(ctypes.c_int64)
        return _dlpack._Tensor(
            data=self.array.ctypes.data - self.fields["byte_offset"],
            device_type=self.where[0],
            device_id=self.where[1],
            ndim=self.ndim,
            shape=ctypes.cast(shape, pointer),
            strides=ctypes.cast(strides, pointer) if self.with_strides else None,
            **self.fields,
        )

    def _capsule(self, versioned):
        deleter = _dlpack._Deleter(self._give_back)
        address = ctypes.cast(deleter, ctypes.c_void_p).value if self.with_deleter else None
        if versioned:
            managed = _dlpack._ManagedVersioned(self.major, 1, None, address, self.flags, self._tensor())
        else:
            managed = _dlpack._Managed(self._tensor(), None, address)
        self.kept += [deleter, managed]
        name = _dlpack._NAME_VERSIONED if versioned else _dlpack._NAME
        return _dlpack._capsule_new(ctypes.addressof(managed), name, None)

    def __dlpack__(self, **wanted):
        if self.versioned is None and "max_version" in wanted:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.streams.append(wanted.get("stream"))
        return self._capsule(bool(self.versioned))

    def __dlpack_device__(self):
        return self.where


class Namespaced(Lender):
    """A lender whose library makes arrays of what is lent to it, as the array API has it."""

    def __array_namespace__(self):
        return numpy

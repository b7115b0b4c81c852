"""What a failing call raises."""


class HyperAttnError(RuntimeError):
    """A call answered another status than OK.

    `status` is its number and `status_name` its name in the C header; the message is the library's sentence.
    """

    def __init__(self, status: int, status_name: str, sentence: str) -> None:
        super().__init__(f"{sentence} [{status_name}]")
        self.status = status
        self.status_name = status_name
        self.sentence = sentence


class InvalidArgument(HyperAttnError, ValueError):
    """An argument is out of range, or inconsistent with another argument."""


class Unsupported(HyperAttnError, NotImplementedError):
    """The request is valid, but this build or machine cannot do it."""


class DeviceUnavailable(HyperAttnError):
    """No usable CUDA device, driver or kernels for the device."""


class OutOfMemory(HyperAttnError, MemoryError):
    """Scratch memory could not be allocated."""

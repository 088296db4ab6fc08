"""NVRTC, NVIDIA's run-time compiler: CUDA C++ in, a cubin for one architecture out. It needs no driver, no device and no CuPy.

Called through ctypes rather than through CuPy's own wrapper: CuPy's adds `-ftz=true` to what it compiles itself, its low-level
calls strip the cubin's last byte, and tests compile with the very code that servers run, without 70 MB of CuPy. The library is
that of NVIDIA's wheel (`nvidia-cuda-nvrtc`, which the extras cuda12 and cuda13 bring), else what the loader finds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib import metadata

from optserve.wire.errors import InternalError, MissingExtraError

OPTIONS = ("-std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
"""The last three are NVRTC's defaults. With them + - * / and roots are correctly rounded, as on a CPU."""

MAJORS = (13, 12)
"""Of CUDA, newest first. 12's compiles for sm_50 to sm_121, 13's from sm_75."""

_WHEELS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}


class Nvrtc:
    """One loaded libnvrtc. Thread safe."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        archs = (ctypes.c_int * count.value)()
        self._check(library.nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
        self.archs = tuple(archs)
        """Compute capabilities that it compiles for, as 10 * major + minor, in order."""

    def image(self, source: str, arch: int) -> bytes:
        """What the driver loads on a device of that compute capability: a cubin, or PTX if NVRTC is older than the device.

        InternalError has NVRTC's log, MissingExtraError says which CUDA still knows an old device.
        """
        if arch in self.archs:
            return self._compiled(source, f"-arch=sm_{arch}", "CUBIN")
        below = [known for known in self.archs if known < arch]
        if not below:
            text = (
                f"NVRTC {self.version[0]}.{self.version[1]} compiles for sm_{self.archs[0]} and later; the device has sm_{arch}"
            )
            raise MissingExtraError(f"{text}: pip install 'optserve[cuda12]'", extra="cuda12")
        return self._compiled(source, f"-arch=compute_{below[-1]}", "PTX")

    def ptx(self, source: str, arch: int) -> str:
        """The virtual instructions, to look at."""
        return self._compiled(source, f"-arch=compute_{arch}", "PTX").rstrip(b"\0").decode()

    def _compiled(self, source: str, arch: str, kind: str) -> bytes:
        program = ctypes.c_void_p()
        created = self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"optserve.cu", 0, None, None)
        self._check(created, "nvrtcCreateProgram")
        try:
            options = _strings((*OPTIONS, arch))
            if self._library.nvrtcCompileProgram(program, len(options), options):
                raise InternalError(f"NVRTC refuses a kernel for {arch}: {self._read(program, 'ProgramLog').decode()[:-1]}")
            return self._read(program, kind)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(self._library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)), f"nvrtcGet{what}Size")
        buffer = ctypes.create_string_buffer(size.value)
        self._check(self._library[f"nvrtcGet{what}"](program, buffer), f"nvrtcGet{what}")
        return buffer.raw

    def _check(self, status: int, call: str) -> None:
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise InternalError(f"{call}: {self._library.nvrtcGetErrorString(status).decode()}")


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def _installed(major: int) -> str | None:
    """The path of the library in NVIDIA's wheel."""
    try:
        files = metadata.files(_WHEELS[major]) or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == f"libnvrtc.so.{major}"), None)


@cache
def find(major: int | None = None) -> Nvrtc:
    """The NVRTC of that CUDA, or the newest there is. A cubin of a newer CUDA than the driver's may not load: name the major.

    MissingExtraError says what to install.
    """
    for wanted in MAJORS if major is None else (major,):
        for path in (_installed(wanted) if wanted in _WHEELS else None, f"libnvrtc.so.{wanted}"):
            if path is not None:
                try:
                    return Nvrtc(ctypes.CDLL(path))
                except OSError:
                    continue
    extra = f"cuda{major or MAJORS[0]}"
    name = f"libnvrtc.so.{major or MAJORS[0]}"
    raise MissingExtraError(f"NVRTC ({name}) is not installed: pip install 'optserve[{extra}]'", extra=extra)

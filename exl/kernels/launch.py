"""Kernels loaded and launched: the one file that imports CuPy, and the one way into a kernel.

Two backends. ``CudaBackend`` compiles with NVRTC and launches on torch's current stream, so a launch can be captured
into a CUDA graph. ``HostBackend`` runs the same sources on the CPU through a library that is handed to it: the test
shim, with which everything above the hardware is proven without a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from exl.errors import KernelError
from exl.kernels.args import Arg, Pointer, device_name
from exl.kernels.compiler import CompileFailed, Compiler, compile_cached
from exl.kernels.cuda_function import CudaFunction, cuda_errors, start_work
from exl.kernels.driver import Driver
from exl.kernels.environment import loaded_nvrtc, nvrtc_command
from exl.kernels.params import Params
from exl.kernels.spec import KernelSpec
from exl.kernels.work import Dim, Work
from exl.layout.arch import arch_limits

MIN_TORCH = (2, 8)  # for GPUs
# torch's allocators go on asking a graph whose capture did not end well, and would ask freed memory.
_BROKEN_GRAPHS: list[torch.cuda.CUDAGraph] = []


class Function(Protocol):
    """A loaded kernel; made by ``Backend.load``, run by ``launch``."""

    spec: KernelSpec
    device: torch.device

    def prepare(self, grid: Dim, block: Dim, params: Params, shared_bytes: int, dependent: bool) -> Work:
        """A launch that reads ``params`` each time it is started. Raises ``KernelError`` for what cannot be launched.
        ``grid`` and ``block`` have three sizes."""

    def run(self, grid: Dim, block: Dim, args: Sequence[Arg], shared_bytes: int, dependent: bool) -> None: ...


class Backend(Protocol):
    """Where kernels run, and what a wrapper may know of it when it picks a configuration."""

    device: torch.device
    arch: int  # compute capability: 86 for 8.6
    num_multiprocessors: int

    def load(self, spec: KernelSpec) -> Function:
        """Compiles if need be; the same function for the same spec. Not during a graph capture."""

    def start(self, work: Sequence[Work]) -> None:
        """One after another, on the stream that launches go to now."""

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        """``function(*tensors)``, in its place among the launches: how a wrapper has torch do something."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """What ``run`` launches, without running it: a call that runs all of it again, with the same addresses. None:
        this backend has no graphs. Raises ``KernelError`` or ``RuntimeError`` for what cannot be captured."""


def launch(
    function: Function,
    grid: Dim,
    block: Dim,
    args: Sequence[Arg],
    shared_bytes: int = 0,
    *,
    dependent: bool = False,
) -> None:
    """Starts ``function`` on ``grid`` x ``block`` threads with ``shared_bytes`` of dynamic shared memory.

    ``args`` are typed (``args.ptr``, ``args.i32``, ...) and in the kernel's order. ``dependent`` lets the kernel start
    before its predecessor on the stream has ended (programmatic dependent launch, sm_90 and up; ignored below): it must
    then call ``griddepcontrol_wait`` before it touches what earlier kernels write. Raises ``KernelError``, before
    anything runs, for a geometry beyond the architecture or arguments that are no ``Arg`` or on another device.
    """
    spec = function.spec
    grid, block = _dims(spec, "grid", grid), _dims(spec, "block", block)
    limits = arch_limits(spec.arch)
    for name, dims, most in (("grid", grid, limits.max_grid), ("block", block, limits.max_block)):
        if any(size > limit for size, limit in zip(dims, most, strict=True)):
            raise KernelError(f"{spec}: {name} {dims} is larger than the architecture's {most}")
    num_threads = block[0] * block[1] * block[2]
    if num_threads > limits.max_threads_per_block:
        raise KernelError(f"{spec}: {num_threads} threads a block, the most is {limits.max_threads_per_block}")
    if not 0 <= shared_bytes <= limits.max_shared_bytes:
        raise KernelError(
            f"{spec}: {shared_bytes} bytes of shared memory a block, sm_{spec.arch} has {limits.max_shared_bytes}"
        )
    for i, arg in enumerate(args):
        if not isinstance(arg, Arg):
            raise KernelError(f"{spec}: argument {i} is a bare {type(arg).__name__}: say ptr(), i32(), f32(), ...")
        if isinstance(arg, Pointer) and arg.dtype != "null" and arg.device != device_name(function.device):
            raise KernelError(f"{spec}: argument {i} is on {arg.device}, the kernel runs on {function.device}")
    function.run(grid, block, args, shared_bytes, dependent)


def _dims(spec: KernelSpec, name: str, dims: Dim) -> tuple[int, int, int]:
    if not 1 <= len(dims) <= 3 or not all(isinstance(size, int) and size >= 1 for size in dims):
        raise KernelError(f"{spec}: {name} {tuple(dims)}: expected one to three positive sizes")
    return tuple((*dims, 1, 1)[:3])


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def _version(text: str) -> tuple[int, ...]:
    """``_version("2.11.0+cu130") == (2, 11)``."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


class CupyCompiler:
    """NVRTC through CuPy's binding; needs CuPy, but no GPU."""

    def __init__(self) -> None:
        try:
            from cupy_backends.cuda.libs import nvrtc
        except ImportError as error:
            raise KernelError(f"kernels are compiled by NVRTC through CuPy, which is not installed: {error}") from error
        self._nvrtc = nvrtc
        try:
            major, minor = nvrtc.getVersion()
        except RuntimeError as error:  # the binding opens the library at the first call
            raise KernelError(f"CuPy is installed, but finds no NVRTC (wheel nvidia-cuda-nvrtc): {error}") from error
        self._version, self._major = f"nvrtc {major}.{minor}", major

    def version(self) -> str:
        return self._version

    def describe(self) -> str:
        """Version and file: several may be installed, and CuPy takes the first that it finds."""
        path = loaded_nvrtc(self._major)
        return f"{self._version.replace('nvrtc', 'NVRTC')}{'' if path is None else f' ({path})'}"

    def require(self, arch: int) -> None:
        """Raises ``KernelError`` for an architecture older than all that this NVRTC knows."""
        known = self.archs()
        if not any(other <= arch for other in known):
            raise KernelError(
                f"{self.describe()} cannot compile for compute capability {arch / 10}: it begins at {min(known) / 10}, "
                f"and CUDA 12 is the last that knows 6.x and 7.0: {nvrtc_command()}"
            )

    def archs(self) -> tuple[int, ...]:
        return tuple(sorted(self._nvrtc.getSupportedArchs()))

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        try:
            program = self._nvrtc.createProgram(text, name, (), ())
        except self._nvrtc.NVRTCError as error:
            raise KernelError(f"{self._version} takes no program: {error}") from error
        try:
            try:
                self._nvrtc.compileProgram(program, options)
            except self._nvrtc.NVRTCError as error:
                raise CompileFailed(f"{self._nvrtc.getProgramLog(program)}\n{error}") from error
            real = any(option.startswith("--gpu-architecture=sm_") for option in options)
            log = self._nvrtc.getProgramLog(program)
            if not real:
                return bytes(self._nvrtc.getPTX(program)), log
            # The binding takes a cubin for a C string and drops its last byte, which is zero: the ELF file's program
            # headers end there. One zero too many, should it be mended, harms nothing.
            return self._nvrtc.getCUBIN(program) + b"\0", log
        finally:
            self._nvrtc.destroyProgram(program)


class CudaBackend:
    """Kernels on one GPU, in torch's primary context.

    ``folder`` holds compiled code (default: the user's cache), ``sources`` the ``.cu`` files (default: exl's own).
    """

    def __init__(
        self,
        device: torch.device | None = None,
        folder: Path | None = None,
        compiler: Compiler | None = None,
        sources: Path | None = None,
    ) -> None:
        if not torch.cuda.is_available():
            raise KernelError("no CUDA device: torch.cuda.is_available() is False")
        if _version(torch.__version__) < MIN_TORCH:  # products of 16 bits with an f32 result
            raise KernelError(f"torch {torch.__version__}: expected {'.'.join(map(str, MIN_TORCH))} or newer on a GPU")
        try:
            import cupy
        except ImportError as error:
            raise KernelError(f"CuPy is not installed: {error}") from error
        self._cupy = cupy
        self._errors = cuda_errors(cupy)
        try:
            index = torch.cuda.current_device() if device is None or device.index is None else device.index
            self.device = torch.device("cuda", index)
            torch.cuda.init()
            properties = torch.cuda.get_device_properties(self.device)
        except RuntimeError as error:
            raise KernelError(f"torch cannot use the GPU: {error}") from error
        self.arch = properties.major * 10 + properties.minor
        self.num_multiprocessors = properties.multi_processor_count
        self._folder = folder
        self._sources = sources
        if compiler is None:
            compiler = CupyCompiler()
            compiler.require(self.arch)
        self._compiler = compiler
        self._driver = Driver()
        self._functions: dict[KernelSpec, CudaFunction] = {}
        self._capture_stream: torch.cuda.Stream | None = None

    def load(self, spec: KernelSpec) -> CudaFunction:
        if spec not in self._functions:
            if torch.cuda.is_current_stream_capturing():
                raise KernelError(f"{spec} must be loaded before a graph is captured")
            code = compile_cached(spec, self._compiler, self._folder, self._sources)
            try:
                module = self._cupy.cuda.function.Module()
                with self._cupy.cuda.Device(self.device.index):
                    module.load(code)
                    function = module.get_function(spec.entry)
            except self._errors as error:
                raise KernelError(f"{spec} cannot be loaded on {self.device}: {error}") from error
            self._functions[spec] = CudaFunction(spec, self.device, function, self._driver, self._cupy)
        return self._functions[spec]

    def start(self, work: Sequence[Work]) -> None:
        start_work(self.device, work)

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        function(*tensors)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        if self._capture_stream is None:
            self._capture_stream = torch.cuda.Stream(self.device)
        gc.collect()  # inside of the capture it could unload a module, which breaks it
        collects = gc.isenabled()
        try:
            gc.disable()
            # Other threads may go on: the one that reads layers from the disk uses no stream.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=self._capture_stream, capture_error_mode="thread_local"),
            ):
                run()
        except BaseException:
            _BROKEN_GRAPHS.append(graph)
            raise
        finally:
            torch.cuda.set_stream(before)  # a capture that fails at its end leaves its own stream behind
            if collects:
                gc.enable()
        return graph.replay


# ---- the CPU, for tests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Param:
    """One parameter of a kernel as its C++ compiler sees it."""

    kind: str  # "p" pointer, "i" signed, "u" unsigned, "f" floating point
    num_bytes: int
    element: str = ""  # of a pointer: dtype name ("f16"), "void", or "struct"
    element_bytes: int = 0
    is_const: bool = False

    def __str__(self) -> str:
        if self.kind == "p":
            return f"{'const ' if self.is_const else ''}{self.element}*"
        return f"{self.kind}{self.num_bytes * 8}"


class HostKernel(Protocol):
    """A kernel compiled for the CPU. ``run`` raises ``KernelError`` for what the kernel does wrong."""

    params: tuple[Param, ...]
    max_threads: int

    def run(self, grid: Dim, block: Dim, args: Sequence[Arg], shared_bytes: int, dependent: bool) -> None: ...


class HostLibrary(Protocol):
    """Compiles kernels for the CPU; tests bring one."""

    def load(self, spec: KernelSpec) -> HostKernel: ...


class HostBackend:
    """Kernels on the CPU as if on a GPU of compute capability ``arch`` with ``num_multiprocessors``."""

    def __init__(self, library: HostLibrary, arch: int = 86, num_multiprocessors: int = 4) -> None:
        self.device = torch.device("cpu")
        self.arch = arch
        self.num_multiprocessors = num_multiprocessors
        self._library = library
        self._functions: dict[KernelSpec, HostFunction] = {}

    def load(self, spec: KernelSpec) -> HostFunction:
        if spec not in self._functions:
            self._functions[spec] = HostFunction(spec, self._library.load(spec))
        return self._functions[spec]

    def start(self, work: Sequence[Work]) -> None:
        for one in work:
            one.start(0)

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        function(*tensors)

    def capture(self, run: Callable[[], None]) -> None:
        return None


class HostFunction:
    """Checks what CUDA would not: the arguments against the kernel's own signature, the block against its bound."""

    def __init__(self, spec: KernelSpec, kernel: HostKernel) -> None:
        self.spec = spec
        self.device = torch.device("cpu")
        self._kernel = kernel

    def prepare(self, grid: Dim, block: Dim, params: Params, shared_bytes: int, dependent: bool) -> Work:
        expected, args = self._kernel.params, params.read()
        if len(args) != len(expected):
            raise KernelError(f"{self.spec} takes {len(expected)} arguments, {len(args)} given")
        for i, (param, arg) in enumerate(zip(expected, args, strict=True)):
            if not matches(param, arg):
                raise KernelError(f"{self.spec}: argument {i} is {arg.dtype}, the kernel's parameter is {param}")
        if block[0] * block[1] * block[2] > self._kernel.max_threads:
            raise KernelError(
                f"{self.spec}: block {tuple(block)} is larger than the {self._kernel.max_threads} declared"
            )
        return _HostLaunch(self._kernel, grid, block, params, shared_bytes, dependent and self.spec.arch >= 90)

    def run(self, grid: Dim, block: Dim, args: Sequence[Arg], shared_bytes: int, dependent: bool) -> None:
        self.prepare(grid, block, Params(args), shared_bytes, dependent).start(0)


@dataclass(frozen=True)
class _HostLaunch:
    """Runs what its packed memory says at that time, as a driver would."""

    kernel: HostKernel
    grid: Dim
    block: Dim
    params: Params
    shared_bytes: int
    dependent: bool

    def start(self, stream: int) -> None:
        self.kernel.run(self.grid, self.block, self.params.read(), self.shared_bytes, self.dependent)


def matches(param: Param, arg: Arg) -> bool:
    """Whether a typed argument fits a parameter. Bytes (u8) and structs of words are how packed weights travel."""
    if isinstance(arg, Pointer):
        if param.kind != "p":
            return False
        raw = arg.dtype in ("null", "u8") or param.element in ("void", "struct")
        same_integer = arg.dtype[1:] == param.element[1:] and {arg.dtype[0], param.element[0]} == {"i", "u"}
        return raw or arg.dtype == param.element or same_integer
    return (param.kind, param.num_bytes * 8) == (arg.dtype[0], int(arg.dtype[1:]))

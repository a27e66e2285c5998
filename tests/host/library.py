"""A kernel's shared library through ctypes: its signature, launches, and the faults in them. Standard library only:
the sanitizers' worker process imports nothing but this file."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

MAX_PARAMS = 64
MESSAGE_BYTES = 2048


class Dim(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]


class ParamStruct(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char),
        ("element", ctypes.c_char),
        ("num_bytes", ctypes.c_uint8),
        ("element_bytes", ctypes.c_uint8),
        ("is_const", ctypes.c_uint8),
    ]


class Range(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("num_bytes", ctypes.c_uint64),
        ("arg", ctypes.c_int32),
        ("writable", ctypes.c_uint8),
        ("early", ctypes.c_uint8),
    ]


class LaunchStruct(ctypes.Structure):
    _fields_ = [
        ("grid", Dim),
        ("block", Dim),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("num_ranges", ctypes.c_uint32),
        ("dependent", ctypes.c_uint8),
        ("ranges", ctypes.POINTER(Range)),
        ("args", ctypes.POINTER(ctypes.c_uint64)),
        ("workspace", ctypes.c_void_p),
    ]


class FaultStruct(ctypes.Structure):
    _fields_ = [
        ("message", ctypes.c_char * MESSAGE_BYTES),
        ("site", ctypes.c_void_p * 2),
        ("block", Dim),
        ("thread", Dim),
        ("warp", ctypes.c_int32),
        ("lane", ctypes.c_int32),
    ]


class StatsStruct(ctypes.Structure):
    _fields_ = [("switches", ctypes.c_uint64), ("collectives", ctypes.c_uint64), ("accesses", ctypes.c_uint64)]


class Request(NamedTuple):
    """One launch in plain numbers: ``slots``: arguments as 8-byte words; ``ranges``: memory that may be accessed."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    seed: int
    dependent: bool
    slots: tuple[int, ...]
    ranges: tuple[tuple[int, int, int, bool, bool], ...]  # start, num_bytes, arg, writable, early


class Fault(NamedTuple):
    """Why a launch stopped. ``{0}`` and ``{1}`` in the message are replaced by the code offsets in ``sites``."""

    message: str
    sites: tuple[int, ...]  # offsets in the shared library
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    warp: int
    lane: int


class Library:
    """A loaded shared library. All libraries of a process share the stacks and the shadow memory."""

    _workspace: int | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.exl_host_launch.argtypes = [ctypes.POINTER(LaunchStruct), ctypes.POINTER(FaultStruct)]
        self._library.exl_host_max_threads.restype = ctypes.c_uint32
        self._base = self._base_address()
        if Library._workspace is None:
            self._library.exl_host_workspace.restype = ctypes.c_void_p
            Library._workspace = self._library.exl_host_workspace()
            if not Library._workspace:
                raise MemoryError("no room for the fibers' stacks")

    def _base_address(self) -> int:
        class Info(ctypes.Structure):
            _fields_ = [
                ("file", ctypes.c_char_p),
                ("base", ctypes.c_void_p),
                ("symbol", ctypes.c_char_p),
                ("address", ctypes.c_void_p),
            ]

        info = Info()
        entry = ctypes.cast(self._library.exl_host_launch, ctypes.c_void_p)
        ctypes.CDLL(None).dladdr(entry, ctypes.byref(info))
        return info.base

    def params(self) -> list[tuple[str, int, str, int, bool]]:
        """(kind, bytes, element kind, element bytes, is const) of each parameter."""
        out = (ParamStruct * MAX_PARAMS)()
        count = self._library.exl_host_params(out)
        return [
            (p.kind.decode(), p.num_bytes, p.element.rstrip(b"\0").decode(), p.element_bytes, bool(p.is_const))
            for p in out[:count]
        ]

    def max_threads(self) -> int:
        return self._library.exl_host_max_threads()

    def stats(self) -> dict[str, int]:
        stats = StatsStruct()
        self._library.exl_host_stats(ctypes.byref(stats))
        return {name: getattr(stats, name) for name, _ in StatsStruct._fields_}

    def launch(self, request: Request) -> Fault | None:
        """Runs all blocks. Returns the first fault, or None."""
        ranges = (Range * max(1, len(request.ranges)))(*(Range(*r) for r in request.ranges))
        slots = (ctypes.c_uint64 * max(1, len(request.slots)))(*request.slots)
        launch = LaunchStruct(
            Dim(*request.grid),
            Dim(*request.block),
            request.shared_bytes,
            request.seed,
            len(request.ranges),
            int(request.dependent),
            ranges,
            slots,
            Library._workspace,
        )
        fault = FaultStruct()
        if not self._library.exl_host_launch(ctypes.byref(launch), ctypes.byref(fault)):
            return None
        sites = tuple(site - self._base for site in fault.site if site)
        place = ((d.x, d.y, d.z) for d in (fault.block, fault.thread))
        return Fault(fault.message.decode(errors="replace"), sites, *place, fault.warp, fault.lane)

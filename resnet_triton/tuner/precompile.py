"""Compile configurations in other processes, so that a launch finds its kernel in Triton's cache on disk.

The cache key holds signature, attributes, options and target just as the launch puts them together, and how it does so
differs between Triton versions. So a worker makes the very launch, on tensors without memory, and stops after compiling
(`JITFunction.warmup`). A driver that only knows its target keeps the worker away from the GPU.
"""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any

from ..codegen import vital_signs
from ..config import ConvConfig, ConvShape
from ..config.device import DeviceFacts
from ..support.processes import Pool
from .trial import SLOW, abstract_call, launches_of


class Compilers:
    """`jobs` processes that compile for one device. `submit` gives a configuration's faults, none if it is sound."""

    def __init__(self, facts: DeviceFacts, jobs: int) -> None:
        self._facts, self._jobs = facts, jobs
        self._pool = self._start()
        self._submitted: dict[tuple[ConvShape, ConvConfig], Future[list[str]]] = {}

    def submit(self, shape: ConvShape, chosen: ConvConfig) -> Future[list[str]]:
        """Start compiling; a second call for the same pair returns the same future, unless its process has died."""
        key = shape, chosen
        known = self._submitted.get(key)
        if known is None or (known.done() and isinstance(known.exception(), BrokenProcessPool)):
            try:
                known = self._pool.submit(faults, shape, chosen, self._facts)
            except BrokenProcessPool:
                self._pool = self._start()
                known = self._pool.submit(faults, shape, chosen, self._facts)
            self._submitted[key] = known
        return known

    def _start(self) -> Pool:
        return Pool(self._jobs, get_context("spawn"), pretend, (self._facts.arch,))

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)


def faults(shape: ConvShape, chosen: ConvConfig, facts: DeviceFacts) -> list[str]:
    """Compile and say what is wrong with the machine code, or with the attempt. OSError if the cache is."""
    try:
        found = []
        for compiled in compile_launches(shape, chosen, facts):
            try:
                code = vital_signs(compiled)
            except ValueError as error:  # it compiled, and cannot be read
                return [str(error)]
            if code.spill_bytes:
                found.append(f"{SLOW}spills {code.spill_bytes} bytes")
            if code.serialized:
                found.append(f"{SLOW}ptxas serialised wgmma")
            if code.shared_memory > facts.shared_memory:
                found.append(f"needs {code.shared_memory} bytes of shared memory")
            found += code.refused
        return found
    except OSError:  # a full disk or a cache of somebody else's: no configuration's fault
        raise
    except Exception as error:  # whatever a compiler raises: this configuration is out, the others are not
        return [f"{type(error).__name__}: {error}".partition("\n")[0]]


def compile_launches(shape: ConvShape, chosen: ConvConfig, facts: DeviceFacts) -> list[Any]:
    """Triton's compiled kernels for this configuration, where `pretend` has been called."""
    call = abstract_call(shape)
    launches = launches_of(call, call.output(), chosen, shape.precision, facts)
    return [launch.compile() for launch in launches]


def pretend(arch: int) -> None:
    """Make Triton compile for this compute capability in this process, whatever GPU there is or is not."""
    from triton.runtime.driver import driver

    driver.set_active(_AbsentDriver(arch))


class _AbsentDriver:
    """What a warm-up asks of a driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

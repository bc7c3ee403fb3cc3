"""Compile the kernels for GPUs that are not here, and judge the machine code.

Every call of a traced model is planned exactly as it would be launched on the target and compiled by Triton and ptxas,
which run on a CPU. A row then says whether the tensor cores and the bulk copy engine are used, whether registers spill,
whether shared memory fits, whether ptxas serialised the asynchronous matrix instructions, whether memory is ordered on
every path, whether NaN and IEEE rounding survive, and how many programs a multiprocessor holds.

    compiler, occupancy -> rows -> report -> budget
"""

from __future__ import annotations

from ..config.targets import TARGETS, target
from .compiler import Specialisation, compile_for, specialise, triton_compile, vital_signs
from .rows import DTYPES, HELD, CompiledLaunch, rows

__all__ = [
    "DTYPES",
    "HELD",
    "TARGETS",
    "CompiledLaunch",
    "Specialisation",
    "compile_for",
    "rows",
    "specialise",
    "target",
    "triton_compile",
    "vital_signs",
]

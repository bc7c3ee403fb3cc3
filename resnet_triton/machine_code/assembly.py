"""Vital signs of a compiled kernel, read from the texts that Triton, ptxas and nvdisasm leave behind."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import dependent, groups, ordering
from .access import loads, stores
from .products import follow

_TENSOR_CORE = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}
# A bulk reduction's text does not name its type; kernels have no use for one anyway.
_FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.:]*\.b?f(?:16|32|64)(?:x2)?\b|\bcp\.reduce\.async\.bulk")
# In PTX: ptxas (12.9, for sm_80) may use the same instruction where it knows an operand, and test for NaN beside it.
_DROPS_NAN = re.compile(r"\b(?:max|min)\.(?![\w.]*NaN)[\w.]*\bb?f(?:16|32|64)(?:x2)?\b")
_APPROXIMATE = re.compile(r"\b[a-z][\w.]*\.(?:approx|full|ftz)\b")


@dataclass(frozen=True)
class Code:
    """Vital signs of one compiled kernel. Sizes in bytes; `spill_bytes` per thread, stores and loads together.

    Instructions, wgmma and waits are counted in the text, so once for a loop. `pendings` holds how many wgmma each wait
    leaves running: a pipelined loop waits with at least one pending. `wgmma_registers` of the wgmma read their first
    operand from registers. `messages` are ptxas's own words. Each wgmma was followed until it is waited for; `hazards`
    says what happens to its registers before (`products.py`).

    `warps` are those of a program (0: not known): a warp-specialised kernel has more than its launch asks for.

    Of a thread's accesses to global memory through pointers, `narrowest_load` is the least in a loop, `widest_load` and
    `widest_store` the most anywhere (0: none).
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    instructions: int
    tensor_core: str  # "wgmma", "tcgen05", "mma" or "none"
    tma: bool = False
    dots: int = 0
    wgmma: int = 0
    wgmma_waits: int = 0
    wgmma_registers: int = 0
    pendings: tuple[int, ...] = ()
    messages: tuple[str, ...] = ()
    hazards: tuple[str, ...] = ()
    float_atomics: int = 0
    disorder: tuple[str, ...] = ()  # rules of `ordering.py` and `dependent.py` that some path breaks
    early: tuple[int, ...] = ()  # numbers of parameters that it reads through before griddepcontrol.wait
    dropped_nans: int = 0  # floating-point maxima and minima whose result may be a number though an operand is NaN
    approximations: int = 0  # square roots, divisions and the like that IEEE would round otherwise, or that flush
    narrowest_load: int = 0
    widest_load: int = 0
    widest_store: int = 0
    warps: int = 0
    specialised: bool = False  # its warps run different parts of it
    setmaxnreg: bool = False  # and hand registers to each other

    @property
    def serialized(self) -> bool:
        """Whether ptxas gave up running wgmma asynchronously."""
        return any("serializ" in message for message in self.messages)

    @property
    def refused(self) -> tuple[str, ...]:
        """What `verdict` would not launch it for."""
        late = self.warps != 4 and ordering.NO_BARRIER_AFTER_PRODUCT in self.disorder
        return self.hazards + (ordering.NO_BARRIER_AFTER_PRODUCT,) * late

    @property
    def widest_access(self) -> int:
        """The most bytes that a thread moves at a time through a pointer."""
        return max(self.widest_load, self.widest_store)

    @property
    def wgmma_per_wait(self) -> float | None:
        """Matrix instructions for each time the program stops for one; None without wgmma."""
        return round(self.wgmma / max(self.wgmma_waits, 1), 2) if self.wgmma else None


def read(*, ttir: str, ttgir: str, ptx: str, sass: str, log: str, shared_memory: int) -> Code:
    """From Triton's texts, nvdisasm's and what `ptxas -v` wrote to stderr."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"no 'Used N registers' in ptxas's report: {log[:200]!r}")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    dots = re.findall(r"= tt\.dot\b", ttir) if ttir else re.findall(r"\bttng\.warp_group_dot\b(?!_)", ttgir)
    waits = re.findall(r"warp_group_dot_wait[^\n]*?pendings = (\d+)", ttgir)
    said = [line for line in log.splitlines() if re.match(r"ptxas.*(?:\(C\d+\)|serializ|warning)", line)]
    flow, followed = groups.ptx(ptx), follow(sass, expected="wgmma.mma_async" in ptx)
    early = dependent.follow(flow, sass)
    return Code(
        registers=int(registers[1]),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        shared_memory=shared_memory,
        instructions=sum(name != "NOP" for name in instructions),  # NOPs pad the end
        tensor_core=next((name for text, name in _TENSOR_CORE.items() if text in ptx), "none"),
        tma="cp.async.bulk.tensor" in ptx,
        dots=len(dots),
        wgmma=followed.products,
        wgmma_waits=sum(name.startswith("WARPGROUP.DEPBAR") for name in instructions),
        wgmma_registers=len(re.findall(r"\b[A-Z]GMMA\S* R\d+, R\d+, gdesc", sass)),
        pendings=tuple(map(int, waits)),
        messages=tuple(dict.fromkeys(line.partition(": ")[2] for line in said)),
        hazards=followed.hazards,
        float_atomics=len(_FLOAT_ATOMIC.findall(ptx)),
        disorder=ordering.broken(flow) + early.faults,
        early=early.parameters,
        dropped_nans=len(_DROPS_NAN.findall(ptx)),
        approximations=len(_APPROXIMATE.findall(ptx)),
        narrowest_load=min(loads(flow.looped()), default=0),
        widest_load=max(loads(flow.lines), default=0),
        widest_store=max(stores(flow.lines), default=0),
        warps=groups.threads(ptx) // 32,
        specialised="ttg.warp_specialize" in ttgir,
        setmaxnreg="setmaxnreg." in ptx,
    )

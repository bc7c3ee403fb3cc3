"""Vital signs of a compiled kernel, read from the texts that Triton, ptxas and nvdisasm leave behind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TENSOR_CORE = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}
# A bulk reduction's text does not name its type; kernels have no use for one anyway.
_FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.[\w.:]*\.b?f(?:16|32|64)(?:x2)?\b|\bcp\.reduce\.async\.bulk")
_AMD_FLOAT_ATOMIC = re.compile(r"_atomic_(?:pk_)?add_b?f(?:16|32|64)\b")


@dataclass(frozen=True)
class Code:
    """Vital signs of one compiled kernel. Sizes in bytes; `spill_bytes` per thread, stores and loads together.

    Instructions, wgmma and waits are counted in the text, so once for a loop. `pendings` holds how many wgmma each wait
    leaves running: a pipelined loop waits with at least one pending. `messages` are ptxas's own words.
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    instructions: int
    tensor_core: str  # "wgmma", "tcgen05", "mma", "mfma" or "none"
    tma: bool = False
    dots: int = 0
    wgmma: int = 0
    wgmma_waits: int = 0
    pendings: tuple[int, ...] = ()
    messages: tuple[str, ...] = ()
    float_atomics: int = 0
    unordered_atomics: int = 0  # atomics with no barrier between them and the store before them

    @property
    def serialized(self) -> bool:
        """Whether ptxas gave up running wgmma asynchronously."""
        return any("serializ" in message for message in self.messages)

    @property
    def wgmma_per_wait(self) -> float | None:
        """Matrix instructions for each time the program stops for one; None without wgmma."""
        return round(self.wgmma / max(self.wgmma_waits, 1), 2) if self.wgmma else None


def read_nvidia(*, ttir: str, ttgir: str, ptx: str, sass: str, log: str, shared_memory: int) -> Code:
    """From Triton's texts, nvdisasm's and what `ptxas -v` wrote to stderr."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"no 'Used N registers' in ptxas's report: {log[:200]!r}")
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    waits = re.findall(r"warp_group_dot_wait[^\n]*?pendings = (\d+)", ttgir)
    said = [line for line in log.splitlines() if re.match(r"ptxas.*(?:\(C\d+\)|serializ|warning)", line)]
    return Code(
        registers=int(registers[1]),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        shared_memory=shared_memory,
        instructions=sum(name != "NOP" for name in instructions),  # NOPs pad the end
        tensor_core=next((name for text, name in _TENSOR_CORE.items() if text in ptx), "none"),
        tma="cp.async.bulk.tensor" in ptx,
        dots=_dots(ttir),
        wgmma=sum(bool(re.match(r"[HQIB]GMMA\b", name)) for name in instructions),
        wgmma_waits=sum(name.startswith("WARPGROUP.DEPBAR") for name in instructions),
        pendings=tuple(map(int, waits)),
        messages=tuple(dict.fromkeys(line.partition(": ")[2] for line in said)),
        float_atomics=len(_FLOAT_ATOMIC.findall(ptx)),
        unordered_atomics=_unordered(ptx.splitlines(), r"\bst\.[\w.]*global", r"\bbar(?:rier)?\.sync", r"\batom\."),
    )


def read_amd(*, ttir: str, assembly: str, shared_memory: int) -> Code:
    """From LLVM's assembly. Registers are vector registers; `spill_bytes` counts each spilt one once."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    if registers is None or spills is None:
        raise ValueError("no .vgpr_count and .vgpr_spill_count in the assembly's metadata")
    lines = assembly.splitlines()
    return Code(
        registers=int(registers[1]),
        spill_bytes=4 * int(spills[1]),
        shared_memory=shared_memory,
        instructions=sum(bool(re.match(r"\s+(?:[sv]|ds|global|buffer|flat|scratch)_\w+", line)) for line in lines),
        tensor_core="mfma" if "v_mfma" in assembly else "none",
        dots=_dots(ttir),
        float_atomics=len(_AMD_FLOAT_ATOMIC.findall(assembly)),
        unordered_atomics=_unordered(lines, r"\b(?:global|buffer)_store", r"\bs_barrier", r"_atomic_"),
    )


def _dots(ttir: str) -> int:
    return len(re.findall(r"= tt\.dot\b", ttir))


def _unordered(lines: Iterable[str], store: str, barrier: str, atomic: str) -> int:
    """Atomics that may announce stores which other threads of the program have not made yet."""
    found, open_store = 0, False
    for line in lines:
        if re.search(store, line):
            open_store = True
        elif re.search(barrier, line):
            open_store = False
        elif open_store and re.search(atomic, line):
            found += 1
    return found

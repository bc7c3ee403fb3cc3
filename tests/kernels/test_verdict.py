"""What becomes of a kernel that nobody has judged, or that is judged unsafe: never a launch."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from compiling import run
from exact import assert_exact, choosing, conv_call, conv_reference, generator, plan, rounded

from resnet_triton import ops
from resnet_triton.config import ConvConfig, ConvShape, choice
from resnet_triton.kernels.launch import Launch
from resnet_triton.machine_code import verdict
from resnet_triton.ops import dispatch

ROOT = Path(__file__).parents[2]
WRONG = Path(__file__).with_name("machine_code") / "wrong_triton_3.7.1.sass"

# --- the pairs of compilers ------------------------------------------------------------------------------------------

PAIR = "import json; from resnet_triton.machine_code import verdict; print(json.dumps(verdict.compilers()))"


@pytest.mark.slow
def test_the_pairs_are_those_that_the_checks_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI with the oldest Triton and the one of constraints.txt, `make verify` with the newest, too."""
    makefile = (ROOT / "Makefile").read_text()
    oldest = re.search(r"^OLDEST_TRITON := (\S+)$", makefile, re.MULTILINE)[1]
    newest = re.search(r"^NEWER_TRITONS := (.*)$", makefile, re.MULTILINE)[1].split()[-1]
    tested = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert {triton for triton, _ in verdict.JUDGED} == {oldest, tested, newest}
    if version("triton") in (oldest, tested, newest):
        assert tuple(json.loads(run(PAIR))) in verdict.JUDGED
    monkeypatch.setenv("PTXAS_OPTIONS", "-O1")
    assert tuple(json.loads(run(PAIR))) == (version("triton"), "")


# --- judging ---------------------------------------------------------------------------------------------------------

JUDGE = """
import json, sys, warnings
from pathlib import Path
import torch
from triton import knobs
from resnet_triton.codegen import vital_signs
from resnet_triton.config import ConvConfig, ConvShape
from resnet_triton.config.targets import KNOWN
from resnet_triton.machine_code import verdict
from resnet_triton.tuner import precompile, trial

wrong, cache = Path(sys.argv[1]).read_text(), Path(sys.argv[2])
precompile.pretend(90)
shape = ConvShape(32, 256, 8, 8, 64)


def launch(num_warps=4, num_stages=2, **changes):
    call = trial.abstract_call(shape)
    tile = ConvConfig(64, 64, 64, num_warps, num_stages, **changes)
    (planned,) = trial.launches_of(call, call.output(), tile, "ieee", KNOWN[90])
    assert not planned.trusted
    return planned


def ask(planned):
    verdict._known.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reason = verdict.unsafe_reason(planned)
    return [reason, [str(w.message) for w in caught], len(list(cache.glob("*/hazards-*.json")))]


def no_reading(cubin):
    raise AssertionError("read again")


def unguard(ptx):
    lines, waited = [], False
    for line in ptx.splitlines():
        waited = "wgmma.wait_group" in line or waited and "cp.async.bulk.tensor" not in line
        lines += [line] * (not waited or "bar.sync" not in line)
    assert len(lines) < len(ptx.splitlines())
    return "\\n".join(lines)


found = {}
for warps in (4, 8):
    unguarded = launch(warps, num_stages=3, box=(1, 1, 64))
    compiled = unguarded.compile()
    assert vital_signs(compiled).refused == ()
    compiled.asm["ptx"] = unguard(compiled.asm["ptx"])
    found[f"no barrier, {warps} warps"] = [ask(unguarded)[0], *vital_signs(compiled).refused]
verdict._warned.clear()
for path in cache.glob("*/hazards-*.json"):
    path.unlink()

reads, read = [], verdict.disassemble
verdict.disassemble = lambda cubin: reads.append(cubin) or read(cubin)
sound, other = launch(box=(1, 1, 64)), launch()
found["sound"] = ask(sound)
assert len(reads) == 1
verdict.disassemble = no_reading
found["remembered"] = ask(sound)
next(iter(cache.glob("*/hazards-*.json"))).write_text("[")
verdict.disassemble = lambda cubin: wrong
found["half a file"] = ask(sound)
found["a second wrong kernel"] = ask(other)

torch.cuda.is_available = torch.cuda.is_current_stream_capturing = lambda: True
third = launch(box=(1, 64, 1))
verdict.disassemble = no_reading
found["capturing"] = ask(third)
torch.cuda.is_current_stream_capturing = lambda: False
type(knobs.nvidia).nvdisasm = knobs.NvidiaTool(str(cache / "none"), "0")
verdict.disassemble = read
found["no disassembler"] = ask(third)

verdict.disassemble = lambda cubin: "        /*0000*/                   BRA `(.L_nowhere) ;"
found["another nvdisasm"] = ask(third)
launched, third.kernel.warmup = third.kernel.warmup, lambda **options: None
found["nothing compiled"] = ask(third)
third.kernel.warmup = launched

known = launch(box=(1, 1, 64))
object.__setattr__(known, "trusted", True)
verdict.disassemble = no_reading
found["trusted"] = ask(known)
verdict.JUDGED = frozenset()
object.__setattr__(third, "trusted", True)
verdict.disassemble = lambda cubin: wrong
found["trusted, by other compilers"] = ask(third)
print(json.dumps(found))
"""


@pytest.mark.skipif(
    version("triton") not in {triton for triton, _ in verdict.JUDGED}, reason="asks for a judged Triton"
)
def test_a_kernel_is_judged_once_and_not_launched_if_it_is_unsafe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = json.loads(run(JUDGE, str(WRONG), str(tmp_path)))
    assert found["no barrier, 4 warps"] == [None]
    reason = "no barrier between the wait for a matrix product and the copy to shared memory after it"
    assert found["no barrier, 8 warps"] == [f"conv_box_kernel may give wrong answers: {reason}", reason]
    assert found["sound"] == found["remembered"] == [None, [], 1]
    reason, (warning,), files = found["half a file"]
    assert reason.startswith("conv_box_kernel may give wrong answers: LDSM.16.M88.4 at 1b90 overwrites R168 of HGMMA")
    assert warning == f"{reason}; such kernels are not launched (resnet-triton doctor says more)"
    assert files == 1
    reason, warnings, files = found["a second wrong kernel"]
    assert reason.startswith("conv_pointer_kernel may give wrong answers: LDSM")
    assert (warnings, files) == ([], 2), "one warning"
    reason, warnings, files = found["capturing"]
    assert len(warnings) == 1, "of another kind"
    assert "nobody has judged it, and a graph is being captured; call it once before" in reason
    assert files == 2, "no verdict, none remembered"
    reason, _, files = found["no disassembler"]
    assert "its machine code cannot be read (FileNotFoundError" in reason
    assert files == 2
    assert "its machine code cannot be read (ValueError: a jump to .L_nowhere" in found["another nvdisasm"][0]
    assert "Triton has compiled nothing to read" in found["nothing compiled"][0]
    assert found["trusted"] == [None, [], 2]
    reason, _, files = found["trusted, by other compilers"]
    assert "overwrites" in reason
    assert files == 3


GLUON = """
import json, sys, warnings
from pathlib import Path
import torch
from resnet_triton.kernels.hopper_conv import hopper_conv
from resnet_triton.kernels.values import RELU, BatchNorm, ConvConfig, Convolution, Geometry
from resnet_triton.machine_code import verdict
from resnet_triton.tuner import precompile

precompile.pretend(90)
warnings.simplefilter("ignore")

def nhwc(*size):
    return torch.empty(size, dtype=torch.float16).to(memory_format=torch.channels_last)

v = torch.ones(64)
launch = hopper_conv(Convolution(
    nhwc(128, 64, 2, 2), nhwc(128, 64, 2, 2), nhwc(64, 64, 3, 3), BatchNorm(v, v, v, v, 1e-5),
    Geometry((1, 1), (1, 1)), residual=None, shortcut=None, activation=RELU, precision="ieee",
    config=ConvConfig(128, 64, 64, 4, 6, (1, 1, 128)), programs=4, partials=None, semaphores=None,
))
object.__setattr__(launch, "trusted", False)
found = [verdict.unsafe_reason(launch)]
verdict._known.clear()
verdict._edition = lambda: "another"
verdict.disassemble = lambda cubin: Path(sys.argv[1]).read_text()
print(json.dumps([*found, verdict.unsafe_reason(launch)]))
"""


def test_a_kernel_whose_warps_have_different_parts_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sound, wrong = json.loads(run(GLUON, str(WRONG)))
    assert sound is None
    assert wrong.startswith("hopper_conv_kernel may give wrong answers: LDSM.16.M88.4 at 1b90 overwrites R168 of HGMMA")


# --- where a call goes then ------------------------------------------------------------------------------------------

SHAPE = ConvShape(3, 16, 6, 6, 32, 3, 3, padding=(1, 1))
BOX = ConvConfig(32, 32, 16, 4, 2).on((2, 4, 4))


@pytest.fixture
def unsafe(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of kernels that the verdict is against, on a GPU whose products are asynchronous."""
    names: set[str] = set()

    def unsafe_reason(launch: Any) -> str | None:
        return f"{launch.kernel.__name__} may give wrong answers" if launch.kernel.__name__ in names else None

    monkeypatch.setattr(ops.operation, "_asynchronous", lambda where, facts: True)
    monkeypatch.setattr(verdict, "unsafe_reason", unsafe_reason)
    dispatch.calls.clear()
    return names


def convolve(device: torch.device, **modes: Any) -> torch.Tensor:
    call = conv_call(generator(device, 0), SHAPE)
    y = replace(call, modes=call.modes._replace(**modes)).compute()
    assert_exact(y, rounded(conv_reference(call), torch.float16))
    return y


def test_an_unsafe_box_takes_pointers(device: torch.device, unsafe: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    lookup, run = choice.lookup, Launch.run

    def in_boxes(*args: Any, descriptors: bool) -> ConvConfig:
        return BOX if descriptors else lookup(*args, descriptors=False)

    def recorded(launch: Launch) -> None:
        launched.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", recorded)
    with choosing(in_boxes):
        convolve(device)
        assert launched == ["conv_box_kernel"]
        unsafe.add("conv_box_kernel")
        convolve(device)
    assert launched == ["conv_box_kernel", "conv_pointer_kernel"]
    assert dispatch.calls == {("conv_bn_relu", "triton"): 2}


def test_where_no_kernel_is_safe_pytorch_answers(device: torch.device, unsafe: set[str]) -> None:
    unsafe.update({"conv_box_kernel", "conv_pointer_kernel", "linear_kernel"})
    with pytest.raises(NotImplementedError, match=r"cannot run this call: conv_\w+_kernel may give"):
        convolve(device)
    with pytest.raises(NotImplementedError, match="batch_invariant=True cannot run here: conv_"):
        convolve(device, batch_invariant=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_fallback_reason", lambda where, forced: None)
        convolve(device, kernels="auto")
        x, weight = torch.ones(2, 8, device=device), torch.ones(3, 8, device=device)
        assert torch.equal(ops.Linear(x, weight).compute(), torch.full((2, 3), 8.0))
    assert dispatch.calls == {("conv_bn_relu", "torch"): 1, ("linear", "torch"): 1}


def test_only_the_projects_own_choice_is_trusted() -> None:
    call = conv_call(generator(torch.device("cpu"), 0), SHAPE)

    assert [launch.trusted for launch in plan(call)] == [True]
    assert [launch.trusted for launch in plan(replace(call, tile=BOX))] == [False]


# --- the doctor ------------------------------------------------------------------------------------------------------

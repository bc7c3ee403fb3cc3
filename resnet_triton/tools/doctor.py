"""`resnet-triton doctor`: what is installed, whether the kernels can run here, and whether they compute right."""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, config, models
from .. import functional as F
from ..config.device import DeviceFacts, facts, override
from ..coverage import report
from ..ops import dispatch, gluon, interpreter, reference
from ..ops.trace import Call
from ..support import files, vision
from ..support.terminal import Bar, table

Json = dict[str, Any]


def examine(bar: Bar) -> Json:
    """Everything `show` prints, as plain data. "ok" is False if a kernel gave a wrong answer or none."""
    gpus, no_gpu = _gpus()
    where = torch.device("cuda" if gpus else "cpu")
    obstacle = no_kernels(where)
    on_gpu = obstacle is None
    model = models.resnet18().eval().to(where, torch.float16 if on_gpu else torch.float32)
    calls = report(model).calls
    layers = [{"layer": c.name, "operator": c.operator, "backend": c.backend, "detail": _detail(c)} for c in calls]
    with bar("reading machine code", None):
        machine_code = _machine_code(calls if on_gpu else [], facts(where))
    tests: list[Json] = []  # last, because a kernel that writes out of bounds ruins the GPU for this process
    if dispatch.HAS_TRITON:
        with bar("testing the kernels", None):
            tests = self_test("cuda") if on_gpu else _interpreted_self_test()
    return {
        "versions": versions(),
        "torchvision": vision.obstacle(),
        "gpus": gpus,
        "untuned": config.untuned(facts(where)) if on_gpu else None,
        "kernels": {"usable": on_gpu, "reason": no_gpu if no_gpu and dispatch.HAS_TRITON else obstacle},
        "cache": _cache(),
        "machine_code": machine_code,
        "self_test": {"backend": "cuda" if on_gpu else "interpreter" if tests else "none", "results": tests},
        "layers": layers,
        "ok": all(test["ok"] is not False for test in tests) and not machine_code["hazards"],
    }


def show(findings: Json) -> None:
    """Print what `examine` found."""
    kernels, cache, tests = findings["kernels"], findings["cache"], findings["self_test"]
    about = [(name, version or "none") for name, version in findings["versions"].items()]
    about += [
        ("GPU", f"{g['name']}, compute capability {g['capability']}, {g['sms']} SMs, {g['shared_memory']} bytes of "
                "shared memory a program") for g in findings["gpus"]
    ]  # fmt: skip
    about.append(("kernels", "run on the GPU" if kernels["usable"] else f"do not run here: {kernels['reason']}"))
    if findings["torchvision"]:
        about.append(("WARNING", findings["torchvision"]))
    if findings["untuned"]:
        about.append(("tiles", findings["untuned"]))
    if findings["machine_code"]["triton"]:
        about.append(("machine code", _verdict(findings["machine_code"])))
    about.append(("Triton cache", cache["path"] or "none"))
    if cache["warning"]:
        about.append(("WARNING", cache["warning"]))
    table("This machine", ("", ""), about)

    if tests["results"]:
        title = {"cuda": "Self-test on the GPU", "interpreter": "Self-test in Triton's interpreter on the CPU"}
        verdict = {True: "exact", False: "WRONG", None: "skipped"}
        rows = [(t["kernel"], t["path"], verdict[t["ok"]], t["detail"]) for t in tests["results"]]
        table(title[tests["backend"]], ("kernel", "path", "against PyTorch", "remark"), rows)
        if tests["backend"] == "interpreter":
            print("The interpreter checks values. It says nothing about speed, nor about a GPU's compiler.\n")
    names = {"triton": "Triton", "torch": "PyTorch"}
    layers = [(c["layer"], c["operator"], names[c["backend"]], c["detail"]) for c in findings["layers"]]
    table("ResNet-18, one image of 224x224 pixels", ("layer", "operator", "runs on", "why, or how"), layers)
    print("Everything that can work here works." if findings["ok"] else "A kernel is wrong: see the self-test above.")


def versions() -> dict[str, str | None]:
    """Versions of what matters; None for what is not installed."""
    return {
        "resnet-triton": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version(lambda: importlib.import_module("triton")),
        "torchvision": _version(vision.torchvision),
        "cuda": torch.version.cuda,
    }


def _machine_code(calls: Sequence[Call], here: DeviceFacts) -> Json:
    """Compilers, and what they make of registers of asynchronous products, where a GPU has such.

    Of `calls`, the launches that lookups choose are compiled and read.
    """
    found: Json = {"triton": None, "ptxas": None, "judged": False, "kernels": 0, "hazards": []}
    if not dispatch.HAS_TRITON:
        return found
    from ..machine_code import verdict

    found["triton"], found["ptxas"] = verdict.compilers()
    found["judged"] = verdict.compilers() in verdict.JUDGED
    if here.arch != 90 or interpreter.active():
        return found
    read: Json = {}
    for launch in (launch for c in calls if c.backend == "triton" for launch in c.launches(here)):
        name = launch.kernel.__name__
        try:
            compiled = launch.compile()
            read[compiled.hash] = [f"{name}: {hazard}" for hazard in verdict.hazards(compiled)]
        except Exception as error:  # whatever a compiler raises belongs into the report
            read[name] = [f"{name}: {type(error).__name__}: {error}".partition("\n")[0]]
    return {**found, "kernels": len(read), "hazards": [line for lines in read.values() for line in lines]}


def _verdict(found: Json) -> str:
    who = f"of Triton {found['triton']} with ptxas {found['ptxas'] or 'and unusual options'}"
    if found["hazards"]:
        return f"{who} is NOT SAFE: {found['hazards'][0]} ({len(found['hazards'])} in all)"
    how = "judged before the release" if found["judged"] else "not judged before the release; each kernel is, once"
    return f"{who}: {how}" + (f"; {found['kernels']} kernels read, no hazard" if found["kernels"] else "")


def no_kernels(where: torch.device) -> str | None:
    """Why compiled kernels cannot run on this device; None if they can."""
    backend, reason = dispatch.choose("auto", where, torch.float32)
    if backend == "triton":
        return "TRITON_INTERPRET is set" if interpreter.active() else None
    return reason


def self_test(device: str) -> list[Json]:
    """Run each kernel on small whole numbers, where every rounding is exact, and compare with PyTorch in fp64."""
    return [_attempt(*case, device=device) for case in _CASES]


def in_interpreter(module: str, payload: bytes = b"") -> Any:
    """`module.interpreted(payload)`, run in a new process with TRITON_INTERPRET=1, which Triton reads at import.

    The result travels as JSON. RuntimeError if the process fails.
    """
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"  # find this package the way this process did
        f"import json; from {module} import interpreted\n"
        "print(json.dumps(interpreted(sys.stdin.buffer.read())))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], input=payload, capture_output=True, env=environment)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the process with Triton's interpreter failed: {' '.join(last) or done.returncode}")
    return json.loads(done.stdout)


def interpreted(payload: bytes) -> list[Json]:
    """What `in_interpreter` calls."""
    return self_test("cpu")


def _interpreted_self_test() -> list[Json]:
    try:
        results: list[Json] = in_interpreter(__name__)
    except RuntimeError as error:
        return [{"kernel": "all", "path": "", "ok": False, "detail": str(error)}]
    return results


def _attempt(kernel: str, path: str, compute: Callable[..., tuple[Tensor, Tensor]], *, device: str) -> Json:
    result: Json = {"kernel": kernel, "path": path, "ok": None, "detail": ""}
    here = facts(torch.device(device))
    if path.startswith("hopper") and not gluon.facts(torch.device(device)).has_gluon:
        return {**result, "detail": "needs compute capability 9.0, and a compiler: none interprets it"}
    if path == "descriptor" and not here.has_descriptors:
        return {**result, "detail": f"needs compute capability 9.0, this GPU has {here.arch / 10}"}
    # A device below 9.0 has no descriptors, so its configurations take the pointer path on any GPU.
    pretended: AbstractContextManager[object] = nullcontext()
    if path in ("descriptor", "pointer"):
        pretended = override(replace(here, gluon=False, arch=80 if path == "pointer" else here.arch))
    torch.manual_seed(0)
    try:
        with torch.inference_mode(), pretended:
            got, wanted = compute(device)
    except Exception as error:  # whatever a compiler or driver raises belongs into the report
        return {**result, "ok": False, "detail": f"{type(error).__name__}: {error}".partition("\n")[0]}
    wrong = int((got.double().cpu() != wanted.half().double()).sum())
    return {**result, "ok": wrong == 0, "detail": f"{wrong} of {got.numel()} values differ" if wrong else ""}


def _integers(device: str, *shape: int) -> tuple[Tensor, Tensor]:
    """The same random whole numbers from -3 to 3 for the kernel, and in fp64 for PyTorch."""
    values = torch.randint(-3, 4, shape).double()
    return values.to(device, torch.float16), values


def _conv(
    device: str, images: int, edge: int, stride: int = 1, residual: bool = True, c: int = 16, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution of `c` channels."""
    result = (images, c, edge // stride, edge // stride)
    shapes = [(images, c, edge, edge), (c, c // groups, 3, 3), (c,), (c,), (c,), result]
    ours, plain = zip(*(_integers(device, *shape) for shape in shapes), strict=True)
    x, weight, mean, bn_weight, bn_bias, add = ours
    got = F.conv_bn_relu(
        x, weight, mean, torch.ones_like(mean), bn_weight, bn_bias, 0.0, stride=stride, padding=1, groups=groups,
        residual=add if residual else None, kernels="triton",
    )  # fmt: skip
    x, weight, mean, bn_weight, bn_bias, add = plain
    wanted = reference.conv_bn_relu(
        x, weight, mean, torch.ones_like(mean), bn_weight, bn_bias, 0.0, stride=(stride, stride), padding=(1, 1),
        groups=groups, residual=add if residual else None,
    )  # fmt: skip
    return got, wanted


def _stem(device: str, filters: int = 16) -> tuple[Tensor, Tensor]:
    shapes = [(2, 3, 14, 18), (filters, 3, 7, 7), (filters,), (filters,), (filters,)]
    ours, plain = zip(*(_integers(device, *shape) for shape in shapes), strict=True)
    x, weight, mean, bn_weight, bn_bias = ours
    got = F.stem(x, weight, mean, torch.ones_like(mean), bn_weight, bn_bias, 0.0, kernels="triton")
    x, weight, mean, bn_weight, bn_bias = plain
    return got, reference.stem(x, weight, mean, torch.ones_like(mean), bn_weight, bn_bias, 0.0)


def _max_pool(device: str) -> tuple[Tensor, Tensor]:
    x, plain = _integers(device, 2, 16, 11, 11)
    return F.max_pool2d(x, 3, 2, 1, kernels="triton"), reference.max_pool2d(plain, (3, 3), (2, 2), (1, 1))


def _global_avg_pool(device: str) -> tuple[Tensor, Tensor]:
    x, plain = _integers(device, 2, 16, 8, 8)
    return F.global_avg_pool(x, kernels="triton"), reference.global_avg_pool(plain)


def _add_relu(device: str) -> tuple[Tensor, Tensor]:
    (x, plain), (other, plain_other) = _integers(device, 2, 16, 7, 7), _integers(device, 2, 16, 7, 7)
    return F.add_relu(x, other, kernels="triton"), reference.add_relu(plain, plain_other)


def _linear(device: str) -> tuple[Tensor, Tensor]:
    ours, plain = zip(*(_integers(device, *shape) for shape in ((5, 48), (10, 48), (10,))), strict=True)
    return F.linear(*ours, kernels="triton"), reference.linear(*plain)


def _avg_pool_linear(device: str) -> tuple[Tensor, Tensor]:
    ours, plain = zip(*(_integers(device, *shape) for shape in ((2, 16, 8, 8), (10, 16), (10,))), strict=True)
    x, weight, bias = plain
    pooled = reference.global_avg_pool(x).flatten(1)
    return F.avg_pool_linear(*ours, kernels="triton"), reference.linear(pooled, weight, bias)


def _gluon(device: str, tile: config.ConvConfig) -> tuple[Tensor, Tensor]:
    with config.pinned(tile):
        return _conv(device, 32, 8, 1, True, 64)


_TILES = [
    config.ConvConfig(128, 64, 64, 4, 6, (1, 4, 32), kernel="hopper_conv"),
    config.ConvConfig(128, 64, 64, 4, 11, (2, 2, 32), kernel="hopper_conv64"),
    config.ConvConfig(32, 64, 64, 4, 1, (4, 8, 1), kernel="hopper_few"),
]


# From 32 images on, whatever can be loaded through descriptors is.
_CASES: list[tuple[str, str, Callable[..., tuple[Tensor, Tensor]]]] = [
    ("stem", "hopper_stem", functools.partial(_stem, filters=64)),
    ("stem", "descriptor", _stem),
    ("stem", "pointer", _stem),
    *(("conv_bn_relu, 3x3 + residual", tile.kernel, functools.partial(_gluon, tile=tile)) for tile in _TILES),
    ("conv_bn_relu, 3x3 + residual", "descriptor", lambda device: _conv(device, 32, 8, 1, True)),
    ("conv_bn_relu, 3x3/2", "descriptor", lambda device: _conv(device, 32, 8, 2, False)),
    ("conv_bn_relu, 3x3 + residual", "pointer", lambda device: _conv(device, 2, 8, 1, True)),
    ("conv_bn_relu, 3x3 + residual", "grouped", functools.partial(_conv, images=2, edge=8, groups=4)),
    ("conv_bn_relu, 3x3 + residual", "depthwise", functools.partial(_conv, images=2, edge=8, groups=16)),
    ("max_pool2d", "", _max_pool),
    ("global_avg_pool", "", _global_avg_pool),
    ("avg_pool_linear", "", _avg_pool_linear),
    ("add_relu", "", _add_relu),
    ("linear", "", _linear),
]


def _gpus() -> tuple[list[Json], str]:
    """The GPUs torch can use, and why there are none."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns when the driver does not suit it
        warnings.simplefilter("always")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        told = [str(w.message).partition("\n")[0] for w in caught]
        built = "torch finds no GPU" if torch.version.cuda else "this torch is built without CUDA"
        return [], told[0] if told else built
    return [
        {"name": f.name, "capability": f"{f.arch / 10}", "sms": f.sm_count, "shared_memory": f.shared_memory}
        for f in (facts(torch.device("cuda", i)) for i in range(found))
    ], ""


_CACHE_HINT = "; set TRITON_CACHE_DIR to a folder with free space that you, and only you, can write to"


def unwritable_cache() -> str | None:
    """Why no kernel can be compiled: Triton's cache folder takes none. Names the folder, and what changes it."""
    _, existing = _cache_folder()
    try:
        files.probe(existing, 1 << 20)  # about a kernel in all its stages
    except OSError as error:
        return f"{existing}: {error.strerror}, so no kernel can be compiled{_CACHE_HINT}"
    return None


def _cache_folder() -> tuple[Path, Path]:
    """Triton's cache folder, and what there is of its path."""
    from triton import knobs

    folder = Path(knobs.cache.dir).absolute()
    return folder, next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _cache() -> Json:
    """Triton's cache folder, and a warning if it cannot be written to, or if others could put code there.

    What it holds is executed. What it cannot hold is an OSError of Triton's at the first call of a kernel.
    """
    if not dispatch.HAS_TRITON:
        return {"path": None, "warning": None}
    folder, existing = _cache_folder()
    warning = unwritable_cache()
    if warning is None:
        try:
            threat = _exposed(existing, folder)
        except OSError as error:  # it can be written to, and not be read
            threat = f"{existing}: {error.strerror}, so who has put code there cannot be told"
        warning = threat and threat + _CACHE_HINT
    return {"path": str(folder), "warning": warning}


def _exposed(existing: Path, cache: Path) -> str | None:
    """How somebody else could have put code into the cache, or could when it is made; None if it does not seem so."""
    if os.name != "posix":
        return None
    threat = "who could put code there that Triton runs"
    for path in (existing, *(existing.iterdir() if existing == cache else ())):
        try:
            owner = path.stat(follow_symlinks=path == existing).st_uid
        except FileNotFoundError:  # another process is writing there
            continue
        if owner not in (os.getuid(), 0):
            return f"{path} belongs to another user (uid {owner}), {threat}"
    return f"{existing} can be written by other users, {threat}" if existing.stat().st_mode & 0o022 else None


def _detail(call: Any) -> str:
    if call.backend != "triton" or not call.tiled:
        return str(call.reason)
    return f"{config.lookup(call.shape, gluon.facts(call.device)).path} path"


def _version(load: Callable[[], Any]) -> str | None:
    try:
        return str(load().__version__)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # installed, and broken in whatever way
        return f"broken ({type(error).__name__}: {error})".partition("\n")[0]

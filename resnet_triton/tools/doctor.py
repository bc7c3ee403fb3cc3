"""`resnet-triton doctor`: what is installed, whether the kernels can run here, and whether they compute right."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, config, models
from ..config import device
from ..config.device import DeviceFacts
from ..coverage import BACKENDS, detail, report
from ..ops import dispatch, gluon, interpreter
from ..ops.trace import Call
from ..support import files, vision
from ..support.terminal import Bar, table
from .self_test import in_interpreter, self_test

Json = dict[str, Any]


def examine(bar: Bar) -> Json:
    """Everything `show` prints, as plain data. "ok" is False if a kernel gave a wrong answer or none."""
    gpus, no_gpu = _gpus()
    where = torch.device("cuda" if gpus else "cpu")
    obstacle = no_kernels(where)
    on_gpu = obstacle is None
    model = models.resnet18().eval().to(where, torch.float16 if on_gpu else torch.float32)
    calls = report(model).calls
    layers = [{"layer": c.name, "operator": c.operator, "backend": c.backend, "detail": detail(c)} for c in calls]
    with bar("reading machine code", None):
        machine_code = _machine_code(calls if on_gpu else [], gluon.facts(where))
    tests: list[Json] = []  # last, because a kernel that writes out of bounds ruins the GPU for this process
    if dispatch.HAS_TRITON:
        with bar("testing the kernels", None):
            tests = self_test("cuda") if on_gpu else _interpreted_self_test()
    return {
        "versions": versions(),
        "torchvision": vision.obstacle(),
        "gpus": gpus,
        "untuned": config.untuned(device.facts(where)) if on_gpu else None,
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
        rows = [(t["call"], ", ".join(t["kernels"]), verdict[t["ok"]], t["detail"]) for t in tests["results"]]
        table(title[tests["backend"]], ("call", "kernels that ran", "against PyTorch", "remark"), rows)
        if tests["backend"] == "interpreter":
            print("The interpreter checks values. It says nothing about speed, nor about a GPU's compiler.\n")
    layers = [(c["layer"], c["operator"], BACKENDS[c["backend"]], c["detail"]) for c in findings["layers"]]
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
    """Compilers, and whether what they make of asynchronous products is sound, where a GPU has such.

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


def _interpreted_self_test() -> list[Json]:
    try:
        results: list[Json] = in_interpreter(self_test.__module__)
    except RuntimeError as error:
        return [{"call": "all", "kernels": [], "ok": False, "detail": str(error)}]
    return results


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
        for f in (device.facts(torch.device("cuda", i)) for i in range(found))
    ], ""


def unwritable_cache() -> str | None:
    """Why no kernel can be compiled: Triton's cache folder takes none. Names the folder, and what changes it."""
    _, existing = _cache_folder()
    try:
        files.probe(existing, 1 << 20)  # about a kernel in all its stages
    except OSError as error:
        hint = "set TRITON_CACHE_DIR to a folder with free space that you can write to"
        return f"{existing}: {error.strerror}, so no kernel can be compiled; {hint}"
    return None


def _cache_folder() -> tuple[Path, Path]:
    """Triton's cache folder, and what there is of its path."""
    from triton import knobs

    folder = Path(knobs.cache.dir).absolute()
    return folder, next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _cache() -> Json:
    """Triton's cache folder, and a warning if it cannot be written to: an OSError of Triton's at the first call."""
    if not dispatch.HAS_TRITON:
        return {"path": None, "warning": None}
    return {"path": str(_cache_folder()[0]), "warning": unwritable_cache()}


def _version(load: Callable[[], Any]) -> str | None:
    try:
        return str(load().__version__)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # installed, and broken in whatever way
        return f"broken ({type(error).__name__}: {error})".partition("\n")[0]

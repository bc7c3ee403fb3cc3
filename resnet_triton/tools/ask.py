"""What each command needs, asked before it does anything: what is missing is one line that says what to do.

`NEEDS` is the one list of it. Each entry is a question, a function of the command's arguments that raises when the
answer is no.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import torch

from ..ops import dispatch, interpreter
from ..support import vision
from ..support.names import find_device
from .doctor import no_kernels, unwritable_cache

Question = Callable[[argparse.Namespace], object]


def ask(command: str, args: argparse.Namespace) -> None:
    """ValueError or ModuleNotFoundError, in one line, for the first thing that `command` needs and lacks."""
    for question in NEEDS[command]:
        question(args)


def _import(name: str) -> None:
    """An optional package, which has to work and not just to be there."""
    try:
        vision.torchvision() if name == "torchvision" else importlib.import_module(name)
    except Exception as error:  # a library it cannot load, a version that does not go with another's
        package = name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
            raise
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{package} is installed, but cannot be imported ({why}); install it again") from None


def _vision(args: argparse.Namespace) -> None:
    _import("PIL.Image")  # torchvision does not say well that it is missing
    _import("torchvision")


def _digits(args: argparse.Namespace) -> None:
    _import("sklearn.datasets")


def _tables(args: argparse.Namespace) -> None:
    if not args.json:
        _import("rich")


def _device(args: argparse.Namespace) -> None:
    find_device(args.device)


def _gpu(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ValueError("no GPU found, expected one (resnet-triton doctor says why)")


def _triton(args: argparse.Namespace) -> None:
    if not dispatch.HAS_TRITON:
        raise ValueError("Triton is not installed, expected it for the kernels; install triton (Linux only)")


def _compiler(args: argparse.Namespace) -> None:
    _triton(args)
    if interpreter.active():
        raise ValueError("TRITON_INTERPRET is set, expected kernels that are compiled; unset it")


def _kernels_on_a_gpu(args: argparse.Namespace) -> None:
    """On a CPU ours is PyTorch, for which nothing is needed."""
    where = find_device(getattr(args, "device", "cuda"))
    if where.type == "cuda":
        _compiler(args)
        if obstacle := no_kernels(where):
            raise ValueError(f"our kernels cannot run on {where}: {obstacle}; resnet-triton doctor says more")


def _cache(args: argparse.Namespace) -> None:
    """Where our kernels are compiled. On a CPU they are not."""
    if hasattr(args, "device") and no_kernels(find_device(args.device)):
        return
    if obstacle := unwritable_cache():
        raise ValueError(obstacle)


NEEDS: dict[str, tuple[Question, ...]] = {
    "doctor": (_tables,),
    "predict": (_vision, _device, _cache),
    "demo": (_tables, _triton, _vision, _digits, _device, _cache),
    "bench": (_tables, _vision, _device, _kernels_on_a_gpu, _cache),
    "compare": (_tables,),
    "codegen": (_compiler, _cache),
    "report": (_tables, _compiler),
    "tune": (_tables, _gpu, _kernels_on_a_gpu, _cache),
    "benchmarks.gpu": (_vision, _gpu, _kernels_on_a_gpu, _cache),
    "benchmarks.gpu --rehearse": (_vision, _triton),
}

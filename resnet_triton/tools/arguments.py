"""The arguments of `resnet-triton`: what each command takes, and what `--help` says of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..config.targets import TARGETS
from ..support.processes import cores

_MODELS = "resnet18, resnet34 or resnet50"
_DTYPES = "float16, bfloat16, tf32 or float32"
_ARCHS = ", ".join(f"{target.name} ({target.facts.name})" for target in TARGETS.values())
_SIZES = "1,8,32,128,256"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """What an option takes that counts something."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _positives(text: str) -> list[int]:
    return [positive(number) for number in _names(text)]


def parser() -> argparse.ArgumentParser:
    """Its `parse_args` raises ValueError for wrong arguments. A default that is text is parsed as if it were given."""
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    whole = _Parser(
        prog="resnet-triton", allow_abbrev=False, parents=[shared],
        description="ResNet-18 inference on hand-written Triton kernels, with torchvision's weights and answers.",
        epilog="Start with: resnet-triton doctor. Exit codes: 0 good, 1 a check failed, 2 wrong input, 129, 130 or 143 "
        "stopped by SIGHUP, Ctrl-C or SIGTERM, 141 nobody reads the output.",
    )  # fmt: skip
    whole.add_argument("--version", action="version", version=f"resnet-triton {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(
        name: str, text: str, example: str, as_json: str = "print JSON, and nothing else, on stdout"
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"Example: {example}",
            allow_abbrev=False, parents=[shared],
        )  # fmt: skip
        added.set_defaults(command=name)
        added.add_argument("--json", action="store_true", help=as_json)
        return added

    def device(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)"
        )

    def models(added: argparse.ArgumentParser, known: str = _MODELS) -> None:
        added.add_argument(
            "--models", type=_names, default="resnet18", metavar="M,M", help=f"{known} (default: %(default)s)"
        )

    def batches(added: argparse.ArgumentParser, default: str, more: str = "") -> None:
        added.add_argument(
            "--batches", type=_positives, default=default, metavar="N,N",
            help=f"images at a time (default: %(default)s){more}",
        )  # fmt: skip

    def dtypes(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--dtypes", type=_names, default="float16", metavar="T,T", help=f"{_DTYPES} (default: %(default)s)"
        )

    def jobs(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--jobs", type=positive, default=cores(), metavar="N",
            help="compiler processes at a time (default: one for each core, here %(default)s)",
        )  # fmt: skip

    command(
        "doctor", "check versions, GPU, Triton cache and every kernel, and show what each layer runs on",
        "resnet-triton doctor --json",
    )  # fmt: skip

    p = command(
        "predict", "classify image files; one that cannot be read is named on stderr, the others go on, and "
        "the exit code is 2",
        "resnet-triton predict cat.jpg photos/ --topk 3 --weights my-resnet18.pt",
        'print a JSON object a line for each image, in order, with "file" and either "top" or "error"',
    )  # fmt: skip
    p.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a JPEG, PNG, WebP, BMP, GIF or TIFF file, or a folder to search with all below it; of several frames the "
        "first; turned upright as EXIF says, transparent made white",
    )
    p.add_argument(
        "--weights", default="DEFAULT", metavar="FILE|NAME",
        help="a ResNet's checkpoint, or torchvision's IMAGENET1K_V1 or DEFAULT for ResNet-18, which are downloaded "
        "once, 45 MB (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--key", metavar="NAME", help="which weights of a checkpoint with several, such as state_dict_ema")
    p.add_argument(
        "--classes",
        metavar="FILE|imagenet",
        help="class names, one a line (default: those that the weights bring along)",
    )
    p.add_argument("--topk", type=positive, default=5, metavar="N", help="classes to show (default: %(default)s)")
    p.add_argument("--batch", type=positive, default=32, metavar="N", help="images at a time (default: %(default)s)")
    device(p)
    p.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"],
        help="auto is float16 on a GPU and float32 on the CPU (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--kernels", default="auto", choices=["auto", "torch", "triton"],
        help="auto: our kernels where they apply, else PyTorch; triton: fail rather than use PyTorch "
        "(default: %(default)s)",
    )  # fmt: skip

    d = command(
        "demo", "train ResNet-18 on handwritten digits (once, about a minute) and compare it with and without "
        "the kernels", "resnet-triton demo",
    )  # fmt: skip
    device(d)

    b = command(
        "bench", "time ResNet and its layers against PyTorch's ways to run them, and write tables and charts",
        "resnet-triton bench --suites model --batches 1,32,256 --baselines 'compile max-autotune,folded graph'",
    )  # fmt: skip
    b.add_argument(
        "--suites", type=_names, default="model,kernel", metavar="S,S",
        help="model times a whole model, kernel its layers (default: %(default)s)",
    )  # fmt: skip
    models(b, f"whose layers to time: {_MODELS}; the first one is timed as a whole, too")
    b.add_argument(
        "--batches", type=_positives, default=[], metavar="N,N",
        help="images at a time (default: 1,2,4,...,256 on a GPU, 1,4,16 on a CPU)",
    )  # fmt: skip
    b.add_argument(
        "--dtypes", type=_names, default=[], metavar="T,T",
        help="float16, bfloat16 or float32 (default: float16 on a GPU, float32 on a CPU)",
    )  # fmt: skip
    b.add_argument(
        "--image", type=positive, default=224, metavar="N", help="height and width of images (default: %(default)s)"
    )
    b.add_argument(
        "--baselines", type=_names, default=[], metavar="B,B", help="what to time the model against (default: all)"
    )
    b.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="when to stop (default: 1800 on a GPU, 480 on a CPU)"
    )
    b.add_argument(
        "--out", type=Path, default=Path("resnet-triton-bench"), metavar="DIR",
        help="folder for results.json, .md and .html (default: %(default)s)",
    )  # fmt: skip
    device(b)

    r = command(
        "compare", "compare two results of bench; exit code 1 if ours became wrong or worse than a limit, or "
        "cannot be compared",
        "resnet-triton compare old/results.json new/results.json --fail-if p50:+5% --fail-if speedup:-3%",
    )  # fmt: skip
    r.add_argument("old", type=Path, metavar="OLD", help="a results.json, or the folder it is in")
    r.add_argument("new", type=Path, metavar="NEW", help="the same, later")
    r.add_argument(
        "--fail-if", action="append", default=[], metavar="METRIC:+N%",
        help="the change that is too much, of p20, p50, p80, first_call, peak_memory or speedup; may be repeated",
    )  # fmt: skip
    r.add_argument(
        "--metric", default="p50", choices=["p20", "p50", "p80", "first_call", "peak_memory", "speedup"],
        help="what the table shows (default: %(default)s)",
    )  # fmt: skip

    c = command(
        "codegen", "compile the kernels for GPUs that need not be here and report on the machine code",
        "resnet-triton codegen --archs 80,90 --batches 1,32 --dtypes float16",
    )  # fmt: skip
    c.add_argument(
        "--archs", type=_names, default="sm_80,sm_90,sm_100", metavar="A,A",
        help=f"of {_ARCHS}; 90 means sm_90 (default: %(default)s)",
    )  # fmt: skip
    batches(c, _SIZES)
    dtypes(c)
    c.add_argument("--out", type=Path, metavar="DIR", help="write a summary there, codegen.json")
    c.add_argument("--budget", type=Path, metavar="FILE", help="fail if a row is worse than in this codegen.json")
    jobs(c)

    w = command(
        "report", "say which kernel each layer gets, on this GPU or on one that need not be here",
        "resnet-triton report --arch sm_90 --models resnet18,resnet50 --batches 1,8,32,256",
    )  # fmt: skip
    w.add_argument("--arch", metavar="ARCH", help=f"{_ARCHS} (default: the GPU here, or sm_90 if there is none)")
    models(w)
    batches(w, "1,8,32,256")
    dtypes(w)

    t = command(
        "tune", "find the fastest tiles for this GPU and write them to its table; go on where an earlier run "
        "stopped", "resnet-triton tune --budget 300 --batches 1,128",
    )  # fmt: skip
    t.add_argument(
        "--budget", type=positive, default=300, metavar="SECONDS", help="when to stop (default: %(default)s)"
    )
    batches(t, _SIZES, "; lookups reach to half and twice a batch")
    dtypes(t)
    models(t, "resnet18, resnet34, resnet50, resnet101 or resnet152")
    t.add_argument(
        "--out", type=Path, metavar="FILE", help="the table to go on with (default: the one that models read)"
    )
    t.add_argument("--again", action="store_true", help="tune shapes that the table has already")
    jobs(t)
    return whole

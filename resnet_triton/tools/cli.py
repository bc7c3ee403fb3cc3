"""The command `resnet-triton`: reads arguments, runs one command, prints what it returns.

Results go to stdout; progress, notes and errors to stderr. Every mistake a user can make ends in one line and exit code
2 (`predict` gives each broken image such a line, and goes on); a check that fails, in exit code 1. All that is heavy is
imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..support import files
from ..support.processes import cores
from ..support.terminal import bar, printable

_OPTIONAL = {
    "rich": "rich", "sklearn": "scikit-learn", "torchvision": "torchvision", "PIL": "pillow",
    "safetensors": "safetensors",
}  # fmt: skip
"""Optional packages by import name, and what installs them."""

_MODELS = "resnet18, resnet34 or resnet50"
_DTYPES = "float16, bfloat16, tf32 or float32"

_REMEDIES = {
    errno.ENOSPC: "; free some space, or choose another place",
    errno.EDQUOT: "; free some space, or choose another place",
    errno.EACCES: "; choose another place, or change its permissions",
    errno.EROFS: "; choose another place",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 (a check failed), 2 (wrong input), 130 (Ctrl-C) or 141 (stdout was closed).

    SIGTERM and SIGHUP end it as Ctrl-C does, with 143 and 129: what was measured is kept, no process stays behind.

    Errors nobody foresaw keep their traceback; `--debug` or RESNET_TRITON_DEBUG=1 shows it for the others too.
    """
    args = argparse.Namespace(debug=os.environ.get("RESNET_TRITON_DEBUG", "0") not in ("", "0"))
    return guarded(lambda: _run(argv, args), lambda: args.debug)


def guarded(work: Callable[[], int], debug: Callable[[], bool] = lambda: False) -> int:
    """The exit code of `work`, or of the way it ended, as `main` says."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a label or file name must not break the output
    try:
        with _ended_like_ctrl_c():
            code = work()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `resnet-triton ... | head`
        _discard_stdout()
        return 141
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:
        message = _explain(error)
        if message is None or debug():
            raise
        _discard_stdout()
        _complain(message)
        return 2
    return code


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, where nobody handles or ignores them, unwind the stack; the first one counts."""

    def stop(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    before = [
        n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n and signal.getsignal(n) == signal.SIG_DFL
    ]
    if threading.current_thread() is not threading.main_thread():
        before = []
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


def _run(argv: Sequence[str] | None, args: argparse.Namespace) -> int:
    try:
        _parser().parse_args(argv, args)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    from .ask import ask

    ask(args.command, args)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    findings = _emit(args, lambda: doctor.examine(bar), doctor.show)
    return 0 if findings["ok"] else 1


def _predict(args: argparse.Namespace) -> int:
    from ..ops import dispatch
    from . import predict

    predictor = predict.Predictor(
        args.weights, topk=args.topk, device=args.device, dtype=args.dtype, kernels=args.kernels, key=args.key,
        classes=args.classes,
    )  # fmt: skip
    before = Counter(dispatch.calls)
    rows = predict.predict(args.images, predictor, args.batch)
    total = None if any(map(os.path.isdir, args.images)) else len(args.images)
    shown: contextlib.AbstractContextManager[Callable[[], None]] = bar("classifying", total)
    if sys.stdout.isatty():  # rows show by themselves how far it is
        shown = contextlib.nullcontext(lambda: None)
    classified, code = False, 0
    with warnings.catch_warnings(), contextlib.closing(rows), shown as step:
        warnings.filterwarnings("ignore", module="PIL")  # of metadata that do not matter here
        for row in rows:
            if "error" in row:
                code = 2
                _complain(f"{row['file']}: {row['error']}")
            elif not classified:
                classified = True
                for note in predictor.classifier.notes:
                    print(f"note: {printable(note)}", file=sys.stderr)
            if args.json:
                print(json.dumps(row, allow_nan=False))
            elif "top" in row:
                predict.show(row)
            sys.stdout.flush()
            step()
    if classified:
        calls = Counter(dispatch.calls) - before
        ran = {backend: sum(n for (_, on), n in calls.items() if on == backend) for backend in ("triton", "torch")}
        print(f"{ran['triton']} layer calls ran on Triton kernels, {ran['torch']} on PyTorch", file=sys.stderr)
    return code


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    result = _emit(args, lambda: demo.run(device=args.device, bar=bar), demo.show)
    if not result["failures"]:
        return 0
    _complain(f"the demo failed: {'; '.join(result['failures'])}; resnet-triton doctor tests each kernel by itself")
    return 1


def _codegen(args: argparse.Namespace) -> int:
    import triton

    from ..codegen import budget, report

    allowed = budget.load(args.budget, triton.__version__) if args.budget else None
    if args.out:
        files.prepare(args.out)
    result = report.compile_all(args.archs, args.batches, args.dtypes, args.jobs, bar)
    if args.out:
        report.write(result, args.out)
    if args.json:
        print(report.as_json(result), end="")
    else:
        report.show(result)
    failures = budget.faults(result) + ([] if allowed is None else list(budget.regressions(result, allowed)))
    return fail(failures)


def _report(args: argparse.Namespace) -> int:
    from . import report

    _emit(args, lambda: report.run(args.arch, args.models, args.batches, args.dtypes), report.show)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from . import tune

    def work() -> Any:
        return tune.run(
            budget=args.budget, batches=args.batches, dtypes=args.dtypes, families=args.models, out=args.out,
            again=args.again, jobs=args.jobs, bar=bar,
        )  # fmt: skip

    result = _emit(args, work, tune.show)
    return fail(tune.faults(result))


def _bench(args: argparse.Namespace) -> int:
    from .. import config
    from ..bench import command, report, results
    from ..config.device import facts
    from ..support.terminal import clock

    suites = [name for name in ("model", "kernel") if getattr(args, f"only_{name}")]
    plan = command.plan(
        device=args.device, suites=suites or ("model", "kernel"), models=args.models, batches=args.batches,
        dtypes=args.dtypes, baselines=args.baselines, budget=args.budget, out=args.out, image=args.image,
    )  # fmt: skip

    unwritten: list[OSError] = []
    if plan.device.type == "cuda" and (note := config.untuned(facts(plan.device))):
        print(f"note: {note}", file=sys.stderr)

    def work() -> Any:
        return command.run(plan, clock(), unwritten.append)

    found = _emit(args, work, report.show, results.as_text)
    if unwritten:  # what was measured has just been shown
        raise unwritten[0]
    return fail(command.faults(found))


def _compare(args: argparse.Namespace) -> int:
    from ..bench import compare
    from ..bench.results import load

    limits = [compare.Limit.parse(text) for text in args.fail_if]
    old, new = load(args.old), load(args.new)
    for line in compare.differences(old, new):
        print(f"note: {line}", file=sys.stderr)
    changes = _emit(args, lambda: compare.compare(old, new, limits, args.metric), compare.show, compare.as_text)
    failures = [f"{compare.title(c.row)}: {failure}" for c in changes for failure in c.failures]
    return fail([*compare.gaps(changes, limits, args.metric), *failures])


def fail(failures: Iterable[str]) -> int:
    """Complain of each; the exit code."""
    found = list(failures)
    for failure in found:
        _complain(failure)
    return 1 if found else 0


def _as_json(result: Any) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def _emit(
    args: argparse.Namespace,
    work: Callable[[], Any],
    show: Callable[[Any], None],
    as_json: Callable[[Any], str] = _as_json,
) -> Any:
    """Do the work, then print its result, as JSON or by `show`. Returns the result."""
    with contextlib.redirect_stdout(io.StringIO()):  # torch.hub says "Downloading ..." there
        result = work()
    if args.json:
        print(as_json(result), end="")
    else:
        show(result)
    return result


def _explain(error: Exception) -> str | None:
    """One line about a failure the user can do something about; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        name = _OPTIONAL.get(package)
        hint = ", or use --json" if package == "rich" else ""
        return name and f"{package} is not installed; install it with: pip install {name}{hint}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, for a GPU
        return "the GPU has too little free memory, expected room for one batch; use a smaller --batch or --device cpu"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: not enough memory" in str(error):
        return "this machine has too little free memory, expected room for one batch; use a smaller --batch"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}{_REMEDIES.get(error.errno or 0, '')}"
    return str(error) if isinstance(error, ValueError | OSError | NotImplementedError) else None


def _complain(message: str) -> None:
    print(f"resnet-triton: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def _discard_stdout() -> None:
    """If stdout takes no more, send the rest of its buffer nowhere; Python would complain when it flushes on exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = _Parser(
        prog="resnet-triton", allow_abbrev=False, parents=[shared],
        description="ResNet-18 inference on hand-written Triton kernels, with torchvision's weights and answers.",
        epilog="Start with: resnet-triton doctor. Exit codes: 0 good, 1 a check failed, 2 wrong input, 129, 130 or 143 "
        "stopped by SIGHUP, Ctrl-C or SIGTERM, 141 nobody reads the output.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"resnet-triton {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        example: str,
        as_json: str = "print JSON, and nothing else, on stdout",
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"Example: {example}",
            allow_abbrev=False, parents=[shared],
        )  # fmt: skip
        added.set_defaults(command=name, run=run)
        added.add_argument("--json", action="store_true", help=as_json)
        return added

    def device(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)"
        )

    command(
        "doctor", _doctor, "check versions, GPU, Triton cache and every kernel, and show what each layer runs on",
        "resnet-triton doctor --json",
    )  # fmt: skip

    p = command(
        "predict", _predict, "classify image files; one that cannot be read is named on stderr, the others go on, and "
        "the exit code is 2",
        "resnet-triton predict cat.jpg photos/ --topk 3 --weights my-resnet18.pt",
        'print a JSON object a line for each image, in order, with "file" and either "top" or "error"',
    )  # fmt: skip
    p.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a JPEG, PNG, WebP, BMP, GIF or TIFF file, or a folder to search with all below it; of several frames the "
        "first; turned upright as EXIF says, 16 bits scaled to 8, transparent made white",
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
        "demo", _demo, "train ResNet-18 on handwritten digits (once, about a minute) and compare it with and without "
        "the kernels", "resnet-triton demo",
    )  # fmt: skip
    device(d)

    b = command(
        "bench", _bench, "time ResNet and its layers against PyTorch's ways to run them, and write tables and charts",
        "resnet-triton bench --model --batches 1,32,256 --baselines 'compile max-autotune,folded graph'",
    )  # fmt: skip
    only = b.add_mutually_exclusive_group()
    only.add_argument("--model", dest="only_model", action="store_true", help="whole models only")
    only.add_argument("--kernels", dest="only_kernel", action="store_true", help="single layers only")
    b.add_argument(
        "--models", type=_names, default=["resnet18"], metavar="M,M",
        help=f"whose layers to time: {_MODELS}; the first one is timed as a whole, too (default: resnet18)",
    )  # fmt: skip
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
        "compare", _compare, "compare two results of bench; exit code 1 if ours became wrong or worse than a limit, or "
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
        "codegen", _codegen, "compile the kernels for GPUs that need not be here and report on the machine code",
        "resnet-triton codegen --archs 80,90 --batches 1,32 --dtypes float16",
    )  # fmt: skip
    c.add_argument(
        "--archs", type=_names, default=["sm_80", "sm_90", "sm_100"], metavar="A,A",
        help="sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120; 90 means sm_90 (default: sm_80,sm_90,sm_100)",
    )  # fmt: skip
    c.add_argument(
        "--batches", type=_positives, default=[1, 8, 32, 128, 256], metavar="N,N",
        help="images at a time (default: 1,8,32,128,256)",
    )  # fmt: skip
    c.add_argument("--dtypes", type=_names, default=["float16"], metavar="T,T", help=f"{_DTYPES} (default: float16)")
    c.add_argument("--out", type=Path, metavar="DIR", help="write a summary there, codegen.json")
    c.add_argument("--budget", type=Path, metavar="FILE", help="fail if a row is worse than in this codegen.json")
    c.add_argument(
        "--jobs", type=positive, default=cores(), metavar="N",
        help="compiler processes at a time (default: one for each core, here %(default)s)",
    )  # fmt: skip

    w = command(
        "report", _report, "say which kernel each layer gets, on this GPU or on one that need not be here",
        "resnet-triton report --arch sm_90 --models resnet18,resnet50 --batches 1,8,32,256",
    )  # fmt: skip
    w.add_argument(
        "--arch", metavar="ARCH",
        help="sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120 (default: the GPU here, or sm_90 if there is none)",
    )  # fmt: skip
    w.add_argument("--models", type=_names, default=["resnet18"], metavar="M,M", help=f"{_MODELS} (default: resnet18)")
    w.add_argument(
        "--batches", type=_positives, default=[1, 8, 32, 256], metavar="N,N",
        help="images at a time (default: 1,8,32,256)",
    )  # fmt: skip
    w.add_argument("--dtypes", type=_names, default=["float16"], metavar="T,T", help=f"{_DTYPES} (default: float16)")

    t = command(
        "tune", _tune, "find the fastest tiles for this GPU and write them to its table; go on where an earlier run "
        "stopped", "resnet-triton tune --budget 300 --batches 1,128",
    )  # fmt: skip
    t.add_argument(
        "--budget", type=positive, default=300, metavar="SECONDS", help="when to stop (default: %(default)s)"
    )
    t.add_argument(
        "--batches", type=_positives, default=[1, 8, 32, 128, 256], metavar="N,N",
        help="images at a time (default: 1,8,32,128,256); lookups reach to half and twice a batch",
    )  # fmt: skip
    t.add_argument("--dtypes", type=_names, default=["float16"], metavar="T,T", help=f"{_DTYPES} (default: float16)")
    t.add_argument("--models", type=_names, default=["resnet18"], metavar="M,M", help=f"{_MODELS} (default: resnet18)")
    t.add_argument(
        "--out", type=Path, metavar="FILE", help="the table to go on with (default: the one that models read)"
    )
    t.add_argument("--again", action="store_true", help="tune shapes that the table has already")
    t.add_argument(
        "--jobs", type=positive, default=cores(), metavar="N",
        help="compiler processes at a time (default: one for each core, here %(default)s)",
    )  # fmt: skip
    return parser

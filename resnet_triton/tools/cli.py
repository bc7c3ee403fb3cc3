"""The command `resnet-triton`: runs one command on its arguments (`arguments.py`), prints what it returns.

Results go to stdout; progress, notes and errors to stderr. Every mistake a user can make ends in one line and exit code
2 (`predict` gives each broken image such a line, and goes on); a check that fails, in exit code 1. All that is heavy is
imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from ..support import files
from ..support.terminal import bar, printable
from .arguments import parser

_OPTIONAL = {
    "rich": "rich", "sklearn": "scikit-learn", "torchvision": "torchvision", "PIL": "pillow",
    "safetensors": "safetensors",
}  # fmt: skip
"""Optional packages by import name, and what installs them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 (a check failed), 2 (wrong input), 130 (Ctrl-C) or 141 (stdout was closed).

    SIGTERM and SIGHUP end it as Ctrl-C does, with 143 and 129: what was measured is kept, no process stays behind.

    Errors nobody foresaw keep their traceback; `--debug` or RESNET_TRITON_DEBUG=1 shows it for the others too.
    """
    args = argparse.Namespace(debug=os.environ.get("RESNET_TRITON_DEBUG", "0") not in ("", "0"))
    return guarded(lambda: _run(argv, args), lambda: args.debug)


def guarded(work: Callable[[], int], debug: Callable[[], bool] = lambda: False) -> int:
    """The exit code of `work`, or of the way it ended, as `main` says."""
    if sys.stdout is None:  # closed before it began
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
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
        parser().parse_args(argv, args)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    from .ask import ask

    ask(args.command, args)
    return _COMMANDS[args.command](args)


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
        print(files.by_line(result), end="")
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
    from ..support.terminal import clock

    plan = command.plan(
        device=args.device, suites=args.suites, models=args.models, batches=args.batches,
        dtypes=args.dtypes, baselines=args.baselines, budget=args.budget, out=args.out, image=args.image,
    )  # fmt: skip

    unwritten: list[OSError] = []
    if plan.device.type == "cuda" and (note := config.untuned(config.device.facts(plan.device))):
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
    rows, failures = compare.compare(old, new, limits, args.metric)
    _emit(args, lambda: rows, compare.show)
    return fail(failures)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": _doctor, "predict": _predict, "demo": _demo, "bench": _bench, "compare": _compare, "codegen": _codegen,
    "report": _report, "tune": _tune,
}  # fmt: skip


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
        return f"{error.filename or 'output'}: {error.strerror}"
    return str(error) if isinstance(error, ValueError | OSError | NotImplementedError) else None


def _complain(message: str) -> None:
    print(f"resnet-triton: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def _discard_stdout() -> None:
    """If stdout takes no more, send the rest of its buffer nowhere; Python would complain when it flushes on exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

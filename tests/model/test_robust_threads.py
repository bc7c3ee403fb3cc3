"""One optimized model, used while others edit, move and forget it, and after calls that failed half way."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from exact import pretending
from fake_cuda import captured, doubled, images, small
from torch.fx.experimental.proxy_tensor import make_fx

from resnet_triton import functional, ops, optimize, programs, refresh, report, revert
from resnet_triton.graphs import fingerprint, runner
from resnet_triton.graphs.snapshot import snapshot
from resnet_triton.ops import AddRelu, GlobalAvgPool, dispatch, interpreter, operation
from resnet_triton.ops.dispatch import Modes
from resnet_triton.support import tensor_files, vision

torchvision = vision.torchvision()


pytestmark = pytest.mark.usefixtures("no_grad")


# --- threads ---------------------------------------------------------------------------------------------------------


def forget(model: Any) -> None:
    refresh(model)


def edit(model: Any) -> None:
    model.fc.bias[0].neg_()  # one number: a call that reads meanwhile finds either sign


def replace(model: Any) -> None:
    bias = model.fc.bias.clone()
    bias[0].neg_()
    model.fc.bias = torch.nn.Parameter(bias)


def change_modes(model: Any) -> None:
    optimize(model, inplace=True, freeze=not model.frozen)


def move(model: Any) -> None:
    """To other memory. PyTorch itself reads what has been freed, or crashes, where a call still uses the memory left: a
    torchvision model does, too. So that memory stays."""
    left = vars(model).setdefault("memory_left", [])

    def moved(t: torch.Tensor) -> torch.Tensor:
        left.append(t.detach())
        return t.clone()

    model.to("cpu").requires_grad_(False)
    model._apply(moved)


STORMS: dict[str, Callable[[Any], object]] = {
    "refreshed": forget, "edited": edit, "replaced": replace, "switched": change_modes, "moved": move,
    "reported": lambda model: report(model, (1, 3, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("storm", STORMS)
def test_threads_call_a_model_that_is(cuda: Any, storm: str) -> None:
    """Each answer is that of a model before the change or after it; afterwards all is as ever."""
    model = small()
    inputs = [images(n, 8) for n in (1, 2)]
    model.fc.bias.copy_(torch.linspace(1, 2, 512))
    allowed = []
    for _ in range(2):
        allowed.append([model._forward_impl(x) for x in inputs])
        edit(model)
    failures: list[str] = []
    stop = threading.Event()

    def work(i: int) -> None:
        try:
            with torch.inference_mode():
                while not stop.is_set():
                    y = model(inputs[i % 2])
                    off = min(float((y - answers[i % 2]).abs().max()) for answers in allowed)
                    if not off < 1e-5:
                        failures.append(f"an answer that is {off} from the old and the new one")
                        return
                    i += 1
        except BaseException as error:
            failures.append(repr(error))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3 if storm == "reported" else 30):
            STORMS[storm](model)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(before)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    for x in inputs:
        assert torch.equal(model(x), model._forward_impl(x))


class Interrupted(str):
    """An attribute's name. Where it is compared, another thread's turn comes, and sets an attribute of the model."""

    __slots__ = ("model",)
    model: Any
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        vars(self.model)[f"set_by_another_thread_{len(vars(self.model))}"] = None
        return str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other


def test_attributes_are_read_while_another_thread_sets_some() -> None:
    model = small()
    name = Interrupted("interrupted")
    name.model = model
    vars(model)[name] = None
    snapshot(model)
    assert "set_by_another_thread" in list(vars(model))[-1]


def test_a_model_forgotten_while_another_thread_moves_it(cuda: Any) -> None:
    model = small()
    captured(model, images())
    known = model._triton_runner

    def forgotten_meanwhile() -> bool:
        refresh(model)
        return False

    with mock.patch.object(runner.Runner, "holds", side_effect=forgotten_meanwhile):
        runner.forget_if_moved(model)
    assert known is not None
    assert model._triton_runner is None


def another_bias(model: Any) -> Callable[[], object]:
    bias = model.fc.bias
    model.fc.bias = torch.nn.Parameter(bias + 1)
    return lambda: setattr(model.fc, "bias", bias)


def another_eps(model: Any) -> Callable[[], object]:
    eps, model.bn1.eps = model.bn1.eps, 0.5
    return lambda: setattr(model.bn1, "eps", eps)


FOR_A_MOMENT: dict[str, Callable[[Any], Callable[[], object]]] = {
    "another parameter": another_bias, "an attribute": another_eps,
    "a hook": lambda model: model.layer4.register_forward_hook(doubled).remove,
}  # fmt: skip


@pytest.mark.skipif(fingerprint._version is None, reason="nothing tells of a change that is undone")
@pytest.mark.parametrize("change", FOR_A_MOMENT)
def test_a_graph_captured_while_another_thread_changes_the_model_for_a_moment(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """As `functional_call` there, or features taken by a hook. PyTorch's calls behind it see nothing."""
    model, x = small(), images()
    model(x)
    capture = cuda.capture

    def in_between(*args: Any) -> Any:
        undo = FOR_A_MOMENT[change](model)
        try:
            return capture(*args)
        finally:
            undo()

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "capture", in_between)
        model(x)
    for _ in range(3):
        assert torch.equal(model(x), model._forward_impl(x))
    assert len(cuda.graphs) == 2
    assert cuda.graphs[-1].replays == 2


def test_a_model_moved_while_another_thread_finds_its_graphs_outdated(cuda: Any) -> None:
    class Meanwhile(runner.Runner):
        """Each time that the fingerprint is read, that thread's turn comes."""

        @property
        def _fingerprint(self) -> Any:
            known, vars(self)["_fingerprint"] = vars(self)["_fingerprint"], None
            return known

        @_fingerprint.setter
        def _fingerprint(self, known: Any) -> None:
            vars(self)["_fingerprint"] = known

    model = small()
    captured(model, images())
    assert model._triton_runner is not None
    model._triton_runner.__class__ = Meanwhile
    model.double()
    assert model._triton_runner is None


def test_a_model_called_while_another_thread_optimizes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(torch.nn.Sequential):
        """Called as soon as it is what `optimize` makes of it."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "__class__":
                answers.append(self(x))

    x, answers = torch.randn(1, 3, 4, 4), []  # type: ignore[var-annotated]
    model = Called(torch.nn.Conv2d(3, 4, 3)).eval()
    expected = model(x)
    optimize(model)
    assert len(answers) == 1
    torch.testing.assert_close(answers[0], expected)


class Viewed(torch.nn.Module):
    """Filters in channels_last memory would make its `view` fail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.view(len(y), -1)


@pytest.mark.filterwarnings("ignore:each call copies")
@pytest.mark.parametrize("step", ["move", "put_back"])
def test_a_first_call_beside_another_threads(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """One compiles, and puts filters back that it has moved. The other waits for that."""
    model, x = Viewed().eval(), torch.randn(2, 3, 4, 4)
    expected = model(x)
    optimize(model, kernels="triton")
    answers: list[torch.Tensor] = []
    threads: list[threading.Thread] = []

    def other() -> None:
        with torch.no_grad():
            answers.append(model(x))

    def meanwhile(*args: Any) -> Any:
        if not threads:
            threads.append(threading.Thread(target=other))
            threads[0].start()
            threads[0].join(0.5)
        return function(*args)

    function = getattr(programs, step)
    monkeypatch.setattr(programs, step, meanwhile)
    answers.append(model(x))
    threads[0].join(60)
    assert len(answers) == 2
    for y in answers:
        torch.testing.assert_close(y, expected)
    assert programs.of(model).made == 1


def test_a_call_that_fails_while_another_thread_puts_filters_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Viewed().eval(), torch.randn(2, 3, 4, 4)
    expected = model(x)
    optimize(model, kernels="triton")
    program = programs.Program(model, replicas=False)
    programs.move(model)
    attempts = []

    def failing(*args: Any) -> torch.Tensor:
        attempts.append(args)
        if len(attempts) == 1:
            programs.put_back(model)
            programs.of(model).stay = True
            raise RuntimeError("view size is not compatible")
        return expected

    monkeypatch.setattr(program, "function", failing)
    assert program.run(model, (x,), {}) is expected
    attempts.clear()
    with pytest.raises(RuntimeError, match="view size"):
        program.run(model, (x,), {})


def test_a_call_while_another_thread_traces() -> None:
    """Up to torch 2.14 torch.compile takes that trace, as `make_fx` makes one, for its caller's, and raises."""
    model, x = optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()), torch.randn(1, 3, 4, 4)
    expected = model(x)
    tracing, called = threading.Event(), threading.Event()

    def traced(x: torch.Tensor) -> torch.Tensor:
        tracing.set()
        assert called.wait(60)
        return x.relu()

    thread = threading.Thread(target=make_fx(traced), args=(x,))
    thread.start()
    try:
        assert tracing.wait(60)
        torch.testing.assert_close(model(x), expected)
    finally:
        called.set()
        thread.join()


def test_reverted_and_optimized_again_between_calls(cuda: Any) -> None:
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3).eval()
    x = images(size=8)
    expected = model(x)
    for _ in range(2):
        optimize(model, inplace=True)
        captured(model, x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(revert(model)(x), expected)


FIRST_USES = """
import sys, torch
from resnet_triton import optimize, report

def compile(*args, **kwargs):
    raise NotImplementedError

torch.compile = compile
model, x = optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()), torch.zeros(1, 3, 4, 4)
for use in (lambda: report(model, x), torch.no_grad()(lambda: model(x))):
    try:
        use()
    except NotImplementedError:
        print(*(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))), "end")
"""


def test_what_torch_compile_needs_is_imported_in_its_order() -> None:
    """Those modules import each other, so two threads that begin with different ones meet some half imported."""
    run = subprocess.run([sys.executable, "-c", FIRST_USES], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["end", "end"]


# --- calls that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=["memory", "ctrl-c"]
)
@pytest.mark.parametrize("where", ["first call", "capture", "copy to a graph", "replay", "answer", "snapshot"])
def test_a_call_that_fails_half_way_leaves_the_model_usable(cuda: Any, where: str, failure: BaseException) -> None:
    """The error is the one that was raised, and no lock, turn or half a graph stays behind."""
    model, x = small(freeze=where == "snapshot"), images(2, 8)
    raiser = mock.Mock(side_effect=failure)
    target: Any = {
        "first call": lambda: mock.patch.object(ops.Operation, "run", raiser),
        "capture": lambda: mock.patch.object(cuda, "capture", raiser),
        "copy to a graph": lambda: mock.patch.object(torch.Tensor, "copy_", raiser),
        "replay": lambda: mock.patch.object(type(cuda.graphs[0]), "replay", raiser),
        "answer": lambda: mock.patch.object(torch.Tensor, "clone", raiser),
        "snapshot": lambda: mock.patch.object(runner, "snapshot", raiser),
    }[where]
    if where == "capture":
        model(x)
    elif where not in ("first call", "snapshot"):
        captured(model, x)
    if where == "capture" and isinstance(failure, Exception):  # the answer was there before
        with target(), pytest.warns(RuntimeWarning, match="its capture failed: no memory"):
            assert torch.equal(model(x), model._forward_impl(x))
    else:
        with target(), pytest.raises(type(failure)) as raised:
            model(x)
        assert raised.value is failure
    assert raiser.called
    for _ in range(3):
        torch.testing.assert_close(model(x), model._forward_impl(x))
    assert model._triton_runner._lock.acquire(blocking=False)


def test_memory_that_runs_out_inside_an_operator_is_torchs_error(device: torch.device) -> None:
    """The next call finds the interpreter's lock, and the counts, as they were."""
    x = torch.randn(1, 4, 2, 2, device=device)
    before = dict(dispatch.calls)
    raiser = mock.Mock(side_effect=torch.OutOfMemoryError("no memory"))
    with mock.patch("resnet_triton.kernels.launch.Launch.run", raiser), pytest.raises(torch.OutOfMemoryError):
        functional.add_relu(x, x, kernels="triton")
    assert raiser.called
    assert dict(dispatch.calls) == before, "what did not run is not counted"
    assert torch.equal(functional.add_relu(x, x, kernels="triton"), (2 * x).relu())


def test_kernels_are_launched_under_the_guard_of_their_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that claim to be on the second GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from resnet_triton.config.targets import KNOWN
    from resnet_triton.kernels.launch import Launch

    current, launched = [0], []

    class Guard:
        def __init__(self, where: Any) -> None:
            self.index = torch.device(where).index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(current[-1]))
    with FakeTensorMode(), pretending(KNOWN[90]):
        x = torch.empty(2, 16, 7, 7, dtype=torch.float16, device="cuda:1", memory_format=torch.channels_last)
        AddRelu(x, x, Modes(kernels="triton")).compute()
        GlobalAvgPool(x, Modes(kernels="triton")).compute()
    assert launched == [1, 1]
    assert current == [0]


def test_a_thread_asks_the_runtime_for_a_context_before_it_launches_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: Triton makes tensor maps without one."""
    asked: list[None] = []
    before: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(None))
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext(len(asked)))

    def work() -> None:
        for _ in range(2):
            with operation.on(torch.device("cuda:0")) as known:
                before.append(known)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert before == [1, 1, 2, 2]


# --- processes -------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], bool], seconds: int = 10) -> bool:
    """Whether `work()` was done, and true, in a fork of this process: as a data loader's workers are made."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)  # a lock that nobody releases
        torch.set_num_threads(1)  # as a data loader does: OpenMP's threads are not in the fork
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("held", ["count", "interpreter", "model", "first call", "checkpoint"])
def test_a_fork_while_another_thread_is_in_a_call(cuda: Any, held: str) -> None:
    """A process is forked with every lock as it is, and without the thread that would release it."""
    model, x, pair = small(freeze=True), images(1, 8), torch.randn(2, 1, 4, 2, 2)
    captured(model, x)
    expected = model(x)
    other = optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval())
    its, file = programs.of(other), io.BytesIO()
    torch.save(x, file)

    def work() -> bool:
        if held == "checkpoint":
            return torch.equal(tensor_files.read(io.BytesIO(file.getvalue())), x)
        if held == "first call":
            return other(x).shape == (1, 4, 6, 6)
        if held == "interpreter":
            return torch.equal(functional.add_relu(*pair, kernels="triton"), pair.sum(0).relu())
        return torch.allclose(model(x), expected)

    lock = {
        "count": dispatch._lock, "interpreter": interpreter._lock, "model": model._triton_runner._lock,
        "first call": its.first, "checkpoint": tensor_files._reading,
    }[held]  # fmt: skip
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        assert forked(work)
    finally:
        done.set()
        thread.join()
    assert work()


def answer(model: Any, x: Any, line: Any) -> None:
    with torch.inference_mode():
        line.send(model(x).tolist())


@pytest.mark.slow
def test_a_model_goes_to_a_process_that_is_spawned() -> None:
    context = multiprocessing.get_context("spawn")
    model = optimize(torchvision.models.resnet18(num_classes=3).eval())
    x = images(size=32)
    near, far = context.Pipe()
    with torch.no_grad():
        process = context.Process(target=functools.partial(answer), args=(model, x, far))
        process.start()
        assert near.poll(120)
        torch.testing.assert_close(torch.tensor(near.recv()), model(x))
    process.join(60)
    assert process.exitcode == 0

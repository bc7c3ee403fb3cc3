"""PyTorch's modes and switches, copies, threads, and what needs a GPU."""

from __future__ import annotations

import contextvars
import copy
import functools
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .dtypes import pixels
from .subjects import FILTERED, PIXELS, SUBJECTS
from .term import BF16, EVERY, FP16, FP32, FP64, Args, Function, Term, call

ANYWHERE = tuple(SUBJECTS)

TF32, GRAD, TRAINING, AUTOCAST = "TF32", "grad mode", "training mode", "autocast"
INFERENCE, THREADS = "inference_mode", "threads"


def _switched(conv: str, matmul: str) -> Callable[[Function, Args], Any]:
    """The newer switches; once they are set, reading the older ones raises."""

    def act(f: Function, args: Args) -> Any:
        switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        before = [switch.fp32_precision for switch in switches]
        try:
            switches[0].fp32_precision, switches[1].fp32_precision = conv, matmul
            return call(f, args)
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value

    return act


def _tf32(subject: str, own: str, promise: str, **other: Any) -> list[Term]:
    """Each switch at TF32 while the other is not."""
    return [
        Term(TF32, subject, f"{'TF32' if allowed else 'IEEE'} if PyTorch's switch of {promise} says so", dtypes=(FP32,),
            act=_switched(*(("tf32", "ieee") if (own == "conv") == allowed else ("ieee", "tf32"))),
            launched={"PRECISION": "tf32" if allowed else "ieee"}, **other)
        for allowed in (True, False)
    ]  # fmt: skip


def _wanted(args: Args) -> list[Tensor]:
    """What can have a gradient: the parameters, and every tensor but running statistics."""
    if "model" in args:
        return [args["x"], *args["model"].parameters()]
    return [t for name, t in args.items() if isinstance(t, Tensor) and "running" not in name]


def _gradients(f: Function, args: Args) -> Any:
    leaves = [t.requires_grad_() for t in _wanted(args)]
    y = f(**args)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    return (y, *(t.grad if t.grad is None else t.grad.flatten() for t in leaves))  # in any memory format


def _unwanted_gradients(f: Function, args: Args) -> Any:
    for t in _wanted(args):
        t.requires_grad_()
    y = call(f, args)
    return y, y.requires_grad


def _inference(f: Function, args: Args) -> Any:
    with torch.inference_mode():
        y = f(**args)
    return y, y.is_inference()


def _autocast(f: Function, args: Args, gradients: bool = True) -> Any:
    """To either dtype, without and with gradients."""
    answers: list[Any] = []
    for dtype in (BF16, FP16):
        cast = dict(args)
        if "residual" in cast:  # another convolution's result, so of autocast's dtype
            cast["residual"] = cast["residual"].to(dtype)
        for wanted in (False, True) if gradients else (False,):
            for t in _wanted(cast):
                t.requires_grad_(wanted and t.is_floating_point())
            with torch.autocast(args["x"].device.type, dtype), torch.set_grad_enabled(wanted):
                y = f(**cast)
            answers += [y.detach(), y.requires_grad]
    return tuple(answers)


def _threads(f: Function, args: Args) -> Any:
    first = call(f, args)  # alone: `optimize` gives filters other memory, which nobody may be reading meanwhile
    with ThreadPoolExecutor(2) as pool:  # in the context of this thread, where another GPU may be played
        started = [pool.submit(contextvars.copy_context().run, call, f, args) for _ in range(2)]
        return (first, *(thread.result() for thread in started))


def _trained(model: nn.Module) -> nn.Module:
    return model.train()


def _training(f: Function, args: Args) -> Any:
    y = f(**args, then=_trained)
    y.square().sum().backward()
    model = args["model"]
    return (y, *model.buffers(), *(p.grad for p in model.parameters()))


MODE_ROWS = [
    *(row for s in FILTERED for row in _tf32(s, "conv", "convolutions")),
    *(row for row in _tf32("linear", "matmul", "matrix products")),
    *(row for row in _tf32("avg_pool_linear", "matmul", "matrix products")),
    *(row for row in _tf32("model", "conv", "convolutions", tolerance=1e-5)),
    *(Term(GRAD, s, "PyTorch's gradients", act=_gradients, dtypes=(FP32,), tolerance=1e-5, refused="gradient")
      for s in ANYWHERE),
    *(Term(GRAD, s, "under no_grad the kernels run", act=_unwanted_gradients, tolerance=5e-3 * (s == "model"))
      for s in ANYWHERE),
    Term(TRAINING, "model", "the batch's statistics, new running ones, PyTorch's gradients", act=_training,
        dtypes=(FP64,), tolerance=1e-9, refused="training mode"),
    *(Term(AUTOCAST, s, "PyTorch's answer and dtype", act=_autocast, dtypes=(FP32,), tolerance=2e-2, refused="autocast")
      for s in (*FILTERED, "linear", "avg_pool_linear", "model")),
    Term(AUTOCAST, "stem", "bytes: PyTorch's answer and dtype", lambda a: (pixels(a), a.update(PIXELS)), act=_autocast,
        dtypes=(FP32,), tolerance=2e-2, refused="autocast"),
    *(Term(AUTOCAST, s, "none of its operators", act=functools.partial(_autocast, gradients=False), dtypes=EVERY)
      for s in ("add_relu", "max_pool2d", "global_avg_pool")),
    *(Term(INFERENCE, s, "an inference tensor", act=_inference, tolerance=5e-3 * (s == "model")) for s in ANYWHERE),
    *(Term(THREADS, s, "the same answer in each", act=_threads, tolerance=5e-3 * (s == "model")) for s in ANYWHERE),
]  # fmt: skip

DEEPCOPY, PICKLE, STATE, TO = "deepcopy", "pickle", "state_dict", ".to()"


def _copied(how: Callable[[Any], Any], f: Function, args: Args) -> Any:
    """A copy of the function with all its arguments."""
    return call(how(functools.partial(f, **args)), {})


def _pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(torch.load(buffer, weights_only=True))
    return model


def _assigned(model: nn.Module) -> nn.Module:
    scaled = {k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(scaled, assign=True)
    return model


def _then(case: str, promise: str, then: Callable[[Any], Any], **other: Any) -> Term:
    return Term(case, "model", promise, lambda a: a.update(then=then), **{"tolerance": 5e-3, **other})


def _moved(model: nn.Module) -> nn.Module:
    return model.to(FP64).to(BF16).to(FP16)


COPY_ROWS = [
    *(Term(case, s, "of what holds the function and its arguments", act=functools.partial(_copied, how))
      for case, how in ((DEEPCOPY, copy.deepcopy), (PICKLE, _pickled)) for s in ANYWHERE if s != "model"),
    _then(DEEPCOPY, "a copy answers alike", copy.deepcopy),
    _then(PICKLE, "what comes back answers alike", _pickled),
    Term(STATE, "model", "torchvision's, in a ResNet of ours", lambda a: a.update(own=True), tolerance=5e-3),
    _then(STATE, "saved, zeroed and loaded", _saved),
    _then(STATE, "loaded with assign=True", _assigned),
    _then(TO, "other dtypes on the way", _moved, tolerance=4e-2),
    _then(TO, "contiguous memory", lambda m: m.to(memory_format=torch.contiguous_format), dtypes=(FP32, FP16)),
    _then(TO, "float64: PyTorch's answer", lambda m: m.double(), dtypes=(FP64,), refused="torch.float64",
          tolerance=1e-12),
]  # fmt: skip

STREAMS, DEVICES, CAPTURE = "streams", "several GPUs", "graph capture"


def _on_a_stream(f: Function, args: Args) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = call(f, args)
    torch.cuda.current_stream().wait_stream(stream)
    return y


def _on_another_device(f: Function, args: Args) -> Any:
    with torch.cuda.device(torch.cuda.device_count() - 1):
        return call(f, args)


def _captured(f: Function, args: Args) -> Any:
    _on_a_stream(f, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(f, args)
    y.zero_()
    graph.replay()
    return y


GPU_ROWS = [
    Term(case, s, promise, act=act, needs_gpu=True)
    for case, promise, act in (
        (STREAMS, "a stream of its own", _on_a_stream),
        (DEVICES, "the device of its tensors, not the current one", _on_another_device),
        (CAPTURE, "replayed into an output of zeros", _captured),
    )
    for s in ANYWHERE if s != "model"
]  # fmt: skip

ROWS = [*MODE_ROWS, *COPY_ROWS, *GPU_ROWS]
CASES = (TF32, GRAD, TRAINING, AUTOCAST, INFERENCE, THREADS, DEEPCOPY, PICKLE, STATE, TO,
         STREAMS, DEVICES, CAPTURE)  # fmt: skip

_OPERATORS = tuple(s for s in SUBJECTS if s != "model")
ABSENT: dict[str, dict[str, tuple[str, ...]]] = {
    TF32: {"no products": ("add_relu", "max_pool2d", "global_avg_pool")},
    **{case: {"a function has no state": _OPERATORS} for case in (TRAINING, STATE, TO)},
    STREAMS: {"tests/model/test_gpu.py::test_several_streams": ("model",)},
    DEVICES: {"tests/model/test_gpu.py::test_another_device_than_the_current_one": ("model",)},
    CAPTURE: {"tests/model/test_gpu.py::test_inside_the_users_own_graph": ("model",)},
}

"""`resnet-triton demo`: train torchvision's ResNet-18 on handwritten digits, then classify with it and with ours.

The digits are scikit-learn's 1797 scans of 8x8 pixels. The point is not the training, which happens once and is kept,
but that the kernels give torchvision's answers: on a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import io
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..convert import optimize
from ..ops import dispatch
from ..ops.precision import fp32_precision
from ..support import vision
from ..support.names import use_device
from ..support.terminal import Bar, table
from .digits import Recipe, half_the_threads, load_digits, sample, trained
from .doctor import no_kernels, versions
from .self_test import in_interpreter

TOLERANCE = 1e-3
"""Largest difference between fp32 logits (about 20 in size) that passes; summation order alone gives about 1e-5."""


@dataclass(frozen=True)
class Outcome:
    """One backend's result. `max_abs_error` is None for NaN, `ms_per_image` where a time would mean nothing."""

    backend: str
    images: int
    accuracy: float
    top1_agreement: float
    max_abs_error: float | None
    ms_per_image: float | None


def run(recipe: Recipe | None = None, *, kernel_images: int = 8, device: str = "auto", bar: Bar) -> dict[str, Any]:
    """Train or load, classify the 360 held-out digits on every backend, and compare. "failures" says what went wrong.

    `kernel_images` is how many digits the interpreter gets where there is no GPU; a GPU gets all of them.
    """
    where = use_device(device)
    obstacle = no_kernels(where)
    if obstacle:
        where = torch.device("cpu")
    recipe = recipe or Recipe()
    digits = load_digits(recipe)
    state, path, notes = trained(recipe, digits, bar)
    model = vision.torchvision().models.resnet18(num_classes=10)
    model.load_state_dict(state)
    # Two models, for filters move to channels_last in ours; torchvision is timed as its users run it.
    pair = {"torchvision": model.eval(), "ours": optimize(model, inplace=False)}
    for either in pair.values():
        either.to(where)
    images, labels = digits.held_out.to(where), digits.labels
    ours = "our kernels" if where.type == "cuda" else "ours on PyTorch"

    before = Counter(dispatch.calls)
    with fp32_precision("ieee"), half_the_threads() as threads:
        logits, times = _classify(pair, images, bar)
        photos = _compare_photos(where)
    expected = logits["torchvision"]
    rows = [
        _outcome(f"torchvision, {where.type} fp32", expected, expected, labels, times["torchvision"]),
        _outcome(f"{ours}, {where.type} fp32", logits["ours"], expected, labels, times["ours"]),
    ]
    kernels = rows[1]
    if where.type == "cuda":
        half, half_times = _classify({name: m.half() for name, m in pair.items()}, images.half(), bar)
        for name, title in (("torchvision", "torchvision"), ("ours", ours)):
            rows.append(_outcome(f"{title}, cuda fp16", half[name], expected, labels, half_times[name]))
        counts = Counter(dispatch.calls) - before
        notes.append("Both models ran on the GPU; fp32 means TF32 off. Times exclude the copy to the GPU.")
    else:
        few = slice(kernel_images)
        with bar(f"{kernel_images} digits through the kernels, interpreted", None):
            answer = _interpret(state, digits.held_out[few])
        counts = Counter({(operator, on): n for operator, on, n in answer["calls"]})
        interpreted_logits = torch.tensor(answer["logits"])
        kernels = _outcome("our kernels, interpreted fp32", interpreted_logits, expected[few], labels[few], None)
        rows.append(kernels)
        notes.append(
            f"Both models ran on PyTorch on the CPU (threads: {threads}); compiled kernels cannot run here: {obstacle}."
        )
        notes.append(
            f"The kernels ran {kernel_images} digits in the Triton interpreter on the CPU: checks values, says nothing "
            f"about speed ({answer['seconds']:.0f} s)."
        )
    launches, fallbacks = (sum(n for (_, on), n in counts.items() if on == name) for name in ("triton", "torch"))
    notes.append(f"{launches} layer calls ran on the kernels, {fallbacks} fell back to PyTorch.")
    notes.append(
        f"Two photographs at 224x224 through random 1000-class weights: logits differ by at most {_number(photos)}."
    )
    if path is not None:
        command = ["resnet-triton", "predict", str(sample(digits, path.parent)), "--weights", str(path)]
        notes.append(f"Try it: {shlex.join(command)}")
    return {
        "images": len(labels),
        "accuracy_torchvision": rows[0].accuracy,
        "accuracy_ours": rows[1].accuracy,
        "top1_agreement": rows[1].top1_agreement,
        "max_abs_error": rows[1].max_abs_error,
        "tolerance": TOLERANCE,
        "kernel_backend": "cuda" if kernels is rows[1] else "interpreter",
        "kernel_images": kernels.images,
        "kernel_launches": launches,
        "kernel_fallbacks": fallbacks,
        "kernel_max_abs_error": kernels.max_abs_error,
        "kernel_top1_agreement": kernels.top1_agreement,
        "photo_max_abs_error": photos,
        "ms_per_image": {row.backend: row.ms_per_image for row in rows},
        "rows": [asdict(row) for row in rows],
        "checkpoint": path and str(path),
        "versions": versions(),
        "notes": notes,
        "failures": _failures(rows[1], kernels, photos, launches, fallbacks),
    }


def show(result: dict[str, Any]) -> None:
    """Print what `run` returned."""
    columns = ("backend", ">images", ">accuracy", ">same top-1", ">largest logit difference", ">ms per image")
    rows = [
        (
            row["backend"], row["images"], f"{row['accuracy']:.1%}", f"{row['top1_agreement']:.1%}",
            _number(row["max_abs_error"]), "-" if row["ms_per_image"] is None else f"{row['ms_per_image']:.2f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    table("Handwritten digits the network has not seen, against torchvision in fp32", columns, rows)
    print("\n".join(result["notes"]))


def interpreted(payload: bytes) -> dict[str, Any]:
    """The part that `in_interpreter` runs: some images through the kernels, in a process with TRITON_INTERPRET=1.

    The TF32 switch stays at its default there. It makes for larger tiles and `conv_box`, hence a run that is
    five times shorter, while the interpreter multiplies in full fp32 whatever the switch says.
    """
    sent = torch.load(io.BytesIO(payload), weights_only=True)
    model = models.resnet18(num_classes=10)
    model.load_state_dict(sent["state"])
    started = time.perf_counter()
    with torch.inference_mode():
        logits = optimize(model.eval(), kernels="triton")(sent["images"])
    return {
        "logits": logits.tolist(),
        "calls": [[*key, n] for key, n in dispatch.calls.items()],
        "seconds": time.perf_counter() - started,
    }


def _interpret(state: dict[str, Tensor], images: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save({"state": state, "images": images.clone()}, buffer)
    return in_interpreter(__name__, buffer.getvalue())


def _classify(pair: dict[str, Any], images: Tensor, bar: Bar) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Logits and median milliseconds per image; the models take turns batch by batch, in alternating order."""
    logits: dict[str, list[Tensor]] = {name: [] for name in pair}
    times: dict[str, list[float]] = {name: [] for name in pair}
    batches = images.split(30)
    with torch.inference_mode(), bar("classifying held-out digits", len(batches)) as step:
        for model in pair.values():
            model(batches[0])  # compiles and warms up
        for i, batch in enumerate(batches):
            for name in sorted(pair, reverse=i % 2 == 0):
                answer, seconds = _timed(pair[name], batch)
                logits[name].append(answer.float().cpu())
                times[name].append(seconds * 1e3 / len(batch))
            step()
    return {name: torch.cat(parts) for name, parts in logits.items()}, {n: median(t) for n, t in times.items()}


def _timed(model: Any, batch: Tensor) -> tuple[Tensor, float]:
    wait: Callable[[], None] = torch.cuda.synchronize if batch.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    answer = model(batch)
    wait()
    return answer, time.perf_counter() - started


def _compare_photos(where: torch.device) -> float | None:
    """Largest logit difference on scikit-learn's two photographs, with random weights: full size, 1000 classes."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    zoo = vision.torchvision().models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = zoo.resnet18().eval()
    prepare = zoo.ResNet18_Weights.IMAGENET1K_V1.transforms()
    photos = torch.stack([prepare(Image.fromarray(photo)) for photo in load_sample_images().images]).to(where)
    with torch.inference_mode():
        ours = optimize(model.to(where), inplace=False)
        return _largest(ours(photos) - model(photos))


def _outcome(backend: str, logits: Tensor, expected: Tensor, labels: Tensor, ms: float | None) -> Outcome:
    top = logits.argmax(1)
    accuracy = float((top == labels).double().mean())
    agreement = float((top == expected.argmax(1)).double().mean())
    return Outcome(backend, len(labels), accuracy, agreement, _largest(logits - expected), ms)


def _largest(differences: Tensor) -> float | None:
    """The largest magnitude; None, which JSON can hold, for NaN or infinity."""
    largest = float(differences.abs().max())
    return largest if math.isfinite(largest) else None


def _number(error: float | None) -> str:
    return "NaN" if error is None else f"{error:.1e}"


def _failures(ours: Outcome, kernels: Outcome, photos: float | None, launches: int, fallbacks: int) -> list[str]:
    found = []
    if launches == 0 or fallbacks:
        found.append(f"{launches} layer calls on the kernels and {fallbacks} on PyTorch, expected some and none")
    rows = dict.fromkeys((ours, kernels))
    found += [
        f"{row.backend}: {row.top1_agreement:.1%} of the answers are torchvision's, expected 100%"
        for row in rows
        if row.top1_agreement != 1.0
    ]
    errors = {row.backend: row.max_abs_error for row in rows} | {"photographs": photos}
    found += [
        f"{name}: logits differ by {_number(error)}, expected at most {TOLERANCE:.0e}"
        for name, error in errors.items()
        if error is None or error > TOLERANCE
    ]
    return found

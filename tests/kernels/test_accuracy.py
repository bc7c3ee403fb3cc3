"""Real-valued data: an error bound per element against fp64, how little of it is needed, and whole models.

`headroom.py` has measured what each operator needs of the bound in `sums.py`. Fresh calls may need little more: a loss
of accuracy that the bound has room for (another order of summation, a coarse root) shows all the same. Planted faults
show what either notices.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import headroom
import photos
import pytest
import torch
from exact import DTYPES, choosing, dtype_id
from headroom import ROWS
from real_cases import DATA, EIGHT_CHANNELS, Series, in_precision
from reliability.planting import planted
from roundings import as_tf32, in_fours, one_by_one, rounding, through
from sums import CUTS, LAM

from resnet_triton import optimize
from resnet_triton.config import ConvConfig
from resnet_triton.config.device import facts
from resnet_triton.ops import dispatch, interpreter
from resnet_triton.support import vision

MARGIN, FLOOR = 1.5, 0.02
"""A fresh call may need so many times the measured figure, and so much where next to nothing was needed."""
SEED = 10**6  # the measured calls have lower ones

EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=str)
FAULTS = pytest.mark.skipif(not interpreter.active(), reason="faults are planted in the interpreter")


def figures(row: Series, device: torch.device) -> dict[str, float]:
    """What the row needed when it was measured."""
    entry = headroom.committed(device)
    if entry is None:
        pytest.skip(f"{headroom.entry_name(device)} has no entry: run python tests/headroom.py")
    return next(r["needed"] for r in entry["rows"] if r.items() >= headroom.record(row).items())


@functools.cache
def fresh(row: Series, device: torch.device) -> dict[str, float]:
    """What a call of each kind of data needs."""
    if row.path == "descriptor" and not facts(device).has_descriptors:
        pytest.skip(f"{facts(device).name} has no descriptors")
    return {data: headroom.needed(row, data, SEED, device) for data in DATA}


def excess(needed: dict[str, float], measured: dict[str, float]) -> dict[str, str]:
    """Where more is needed than the figures allow."""
    allowed = {data: MARGIN * measured[data] + FLOOR for data in needed}
    return {data: f"{n:.3g} of {allowed[data]:.3g}" for data, n in needed.items() if not n <= allowed[data]}


@EVERY_ROW
def test_error_bound(device: torch.device, row: Series) -> None:
    needed, bound = fresh(row, device), headroom.limit(row, device)
    assert bound is None or all(n <= bound for n in needed.values()), needed


@EVERY_ROW
def test_no_more_is_needed_than_was_measured(device: torch.device, row: Series) -> None:
    assert not excess(fresh(row, device), figures(row, device))


@EVERY_ROW
def test_measured_figures_keep_the_bound(device: torch.device, row: Series) -> None:
    measured, bound = figures(row, device), headroom.limit(row, device)
    assert measured.keys() >= set(DATA)
    assert bound is None or all(n <= bound for n in measured.values()), measured


# --- planted faults --------------------------------------------------------------------------------------------------

CONV, LINEAR = (Series(name, "pointer", torch.float32) for name in ("conv_bn_relu", "linear"))


@FAULTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    ("operator", "path", "instruction"),
    [
        ("conv_bn_relu", "descriptor", "create_dot"),
        ("conv_bn_relu", "pointer", "create_dot"),
        ("stem", "descriptor", "create_dot"),
        ("linear", "pointer", "create_dot"),
        ("avg_pool_linear", "pointer", "create_fadd"),
    ],
)
def test_bound_notices_sums_in_16_bits(
    device: torch.device, operator: str, path: str, instruction: str, dtype: torch.dtype
) -> None:
    with rounding(instruction, result=through(dtype)):
        assert headroom.needed(Series(operator, path, dtype), "uniform, positive", SEED, device) > 4 * LAM


@FAULTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_bound_notices_a_mean_of_a_sum_in_16_bits(device: torch.device, dtype: torch.dtype) -> None:
    sum_in_16_bits = "tl.sum(acc, 0).to(y_ptr.dtype.element_ty).to(tl.float32)"
    with planted("global_avg_pool.py", "global_avg_pool_kernel", "tl.sum(acc, 0)", sum_in_16_bits):
        assert headroom.needed(Series("global_avg_pool", "pointer", dtype), "normal", SEED, device) > 4 * LAM


@FAULTS
@pytest.mark.parametrize("row", [CONV, LINEAR], ids=str)
def test_bound_notices_tf32(device: torch.device, row: Series) -> None:
    with rounding("create_dot", operands=as_tf32):
        assert headroom.needed(row, "normal", SEED, device) > 4 * LAM
    assert headroom.needed(row._replace(precision="tf32"), "normal", SEED, device) <= CUTS


def root(becomes: str) -> contextlib.AbstractContextManager[None]:
    return planted("tiles.py", "scale_and_shift", "tl.sqrt_rn(var + eps)", becomes)


FEW = CONV._replace(shapes=EIGHT_CHANNELS)
SMALL_FAULTS = {
    "another order of summation": (CONV, "heavy tails", one_by_one),
    "sums without their last bits": (CONV, "normal", lambda: rounding("create_dot", result=in_fours)),
    "a coarse root": (FEW, "normal", lambda: root("tl.sqrt_rn(var + eps) * 1.000001")),
    "a root of no denormals": (
        FEW, "normal", lambda: root("tl.where(var + eps < 1.2e-38, 0, tl.sqrt_rn(var + eps))"),
    ),
}  # fmt: skip


@FAULTS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the quotient by a root of zero
@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_measured_figures_notice(device: torch.device, fault: str) -> None:
    row, data, plant = SMALL_FAULTS[fault]
    with plant():
        needed = {data: headroom.needed(row, data, SEED, device)}
    assert excess(needed, figures(row, device))


# --- an outside oracle -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchvision_resnet18(device: torch.device, unrounded: None) -> None:
    """The logits that torchvision expects of its own ResNet-18, computed by our kernels from end to end."""
    torch.manual_seed(0)
    model = vision.torchvision().models.resnet18(num_classes=50).eval()
    x = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        logits = model(x)
    # test/expect/ModelTester.test_resnet18_expect.pkl in torchvision's repository
    assert logits.sum().item() == pytest.approx(8.437855, abs=1e-4)
    assert logits.argmax() == 38

    ours = optimize(model, kernels="triton").to(device)
    state = {name: t.clone() for name, t in ours.state_dict().items()}
    image, before = x.to(device), dispatch.calls.copy()
    precision = "ieee" if device.type == "cuda" else "tf32"
    with torch.inference_mode(), in_precision(precision):
        y = ours(image)
    expected = {"stem": 1, "conv_bn_relu": 16, "avg_pool_linear": 1}
    assert dispatch.calls - before == {(name, "triton"): count for name, count in expected.items()}
    torch.testing.assert_close(y.cpu(), logits, rtol=0.0, atol=1e-5)
    assert torch.equal(image.cpu(), x)
    for name, t in ours.state_dict().items():
        assert torch.equal(t, state[name]), name


# --- whole models ----------------------------------------------------------------------------------------------------


LARGE = ConvConfig(128, 128, 64, 8, 2)
"""Few programs: the interpreter takes its time for each."""


@pytest.mark.parametrize(
    ("kernels", "dtype", "tiles"),
    [
        *(("torch", dtype, None) for dtype in DTYPES),
        *(pytest.param("triton", dtype, LARGE, marks=pytest.mark.slow) for dtype in DTYPES),
        pytest.param("triton", torch.float16, None, marks=pytest.mark.slow),
    ],
    ids=lambda value: "looked-up" if value is None else "large" if value is LARGE else str(value),
)
def test_a_model_is_as_accurate_as_pytorch(
    device: torch.device, kernels: str, dtype: torch.dtype, tiles: ConvConfig | None
) -> None:
    """On photographs: at most twice the error of PyTorch in the same dtype, and the same class where it is clear.

    Five, because the PyTorch way normalises that many in place; of the kernels' two.
    """
    model = vision.torchvision().models.resnet18(num_classes=50).eval()
    model.load_state_dict(photos.state(50))
    rounded, x = model.to(device, dtype), photos.crops(5 if kernels == "torch" else 2, 64, seed=2).to(device, dtype)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = copy.deepcopy(rounded).double()(x.double())
        theirs = rounded(x)
        before = dispatch.calls.copy()
        with choosing(lambda *_, **__: tiles) if tiles and device.type == "cpu" else contextlib.nullcontext():
            ours = optimize(rounded, kernels=kernels)(x)
    expected = {"stem": 1, "conv_bn_relu": 16, "avg_pool_linear": 1}
    assert dispatch.calls - before == {(name, kernels): count for name, count in expected.items()}
    error, allowed = ((y.double() - exact).abs().max().item() for y in (ours, theirs))
    assert error <= 2 * allowed
    top = exact.topk(2).values
    clear = top[:, 0] - top[:, 1] > 4 * max(error, allowed)
    assert clear.any()
    assert torch.equal(ours.argmax(1)[clear], exact.argmax(1)[clear])

"""FLOPs and bytes of the kernels against counts made elsewhere and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_triton import resnet18, resnet50
from resnet_triton.kernels import cost
from resnet_triton.ops.trace import trace


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_flops_are_those_pytorch_counts(build):
    model = build().eval()
    shape = (2, 3, 64, 64)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(shape))
    c = model.fc.in_features
    flops = sum(call.ours.cost().flops for call in trace(model, shape))
    assert flops - cost.global_avg_pool(n=2, c=c, h=2, w=2, itemsize=4).flops == counted.get_total_flops()


def test_flops_of_the_stem_are_those_pytorch_counts_for_odd_sizes():
    with FlopCounterMode(display=False) as counted:
        y = torch.nn.functional.conv2d(torch.zeros(2, 3, 17, 30), torch.zeros(8, 3, 7, 7), stride=2, padding=3)
    p, q = torch.nn.functional.max_pool2d(y, 3, 2, 1).shape[2:]
    assert cost.stem(n=2, c=3, h=17, w=30, k=8, p=p, q=q, itemsize=2).flops == counted.get_total_flops()


def test_bytes_read_each_input_once_and_write_each_output_once():
    layer = {"n": 2, "c": 64, "h": 28, "w": 28, "k": 128, "p": 14, "q": 14, "itemsize": 2}
    x, y = 2 * 64 * 28 * 28, 2 * 128 * 14 * 14
    assert cost.conv_bn_relu(**layer, r=3, s=3, stride=(2, 2)).bytes == 2 * (x + y + 128 * 64 * 9)
    assert cost.conv_bn_relu(**layer, r=3, s=3, stride=(2, 2), residual=True).bytes == 2 * (x + 2 * y + 128 * 64 * 9)
    # A 1x1 filter with stride 2 reads every second row and column.
    assert cost.conv_bn_relu(**layer, r=1, s=1, stride=(2, 2)).bytes == 2 * (x // 4 + y + 128 * 64)
    tiny = cost.conv_bn_relu(n=1, c=16, h=1, w=1, k=16, p=2, q=2, r=1, s=1, itemsize=2, stride=(2, 2))
    assert tiny.bytes == 2 * (16 + 4 * 16 + 16 * 16), "padding is not read"
    with_shortcut = cost.conv_bn_relu(**layer, r=3, s=3, stride=(2, 2), shortcut_c=32)
    assert with_shortcut.bytes == 2 * (x + y + 128 * 64 * 9 + 128 * 32 + 2 * 32 * 14 * 14)
    assert with_shortcut.flops == 2 * y * (64 * 9 + 32)
    assert cost.max_pool(n=2, c=3, h=8, w=8, p=4, q=4, itemsize=4) == (0, 4 * 6 * (64 + 16))
    assert cost.global_avg_pool(n=2, c=3, h=8, w=8, itemsize=4) == (2 * 3 * 64, 4 * 6 * 65)
    assert cost.add_relu(numel=10, itemsize=2) == (10, 60)
    assert cost.linear(m=2, c=3, k=5, itemsize=2) == (60, 2 * (6 + 15 + 10))
    assert cost.stem(n=2, c=3, h=16, w=16, k=8, p=4, q=4, itemsize=2).bytes == 2 * (
        2 * 3 * 256 + 8 * 3 * 49 + 2 * 8 * 16
    )
    assert cost.avg_pool_linear(n=2, c=3, h=8, w=8, k=5, itemsize=2) == (2 * 3 * 64 + 60, 2 * (2 * 3 * 64 + 15 + 10))


def test_no_size_is_taken_for_another():
    """Each is a prime of its own, and none is the 2 that stands before products."""
    n, c, h, w, k, p, q, r, s, item = 31, 3, 5, 7, 11, 13, 17, 19, 23, 29
    x, y = n * c * h * w, n * k * p * q
    image = {"n": n, "c": c, "h": h, "w": w}
    full = {**image, "k": k, "p": p, "q": q, "itemsize": item}
    assert cost.conv_bn_relu(**full, r=r, s=s) == (2 * y * c * r * s, item * (x + k * c * r * s + y))
    grouped = cost.conv_bn_relu(**full | {"c": 6}, r=r, s=s, groups=3)
    assert grouped == (2 * y * 2 * r * s, item * (2 * x + k * 2 * r * s + y))
    assert cost.stem(**full) == (2 * n * 3 * 4 * k * c * 49, item * (x + k * c * 49 + y))
    assert cost.stem(**full | {"w": 8}).flops == 2 * n * 3 * 4 * k * c * 49
    assert cost.max_pool(**image, p=p, q=q, itemsize=item) == (0, item * (x + n * c * p * q))
    assert cost.global_avg_pool(**image, itemsize=item) == (x, item * (x + n * c))
    assert cost.avg_pool_linear(**image, k=k, itemsize=item) == (x + 2 * n * c * k, item * (x + k * c + n * k))
    assert cost.linear(m=n, c=c, k=k, itemsize=item) == (2 * n * c * k, item * (n * c + k * c + n * k))
    assert cost.add_relu(numel=h, itemsize=item) == (h, 3 * h * item)


@pytest.mark.parametrize(
    ("r", "s", "rows", "columns"), [(1, 3, 13, 51), (3, 1, 40, 17), (2, 4, 26, 70), (3, 4, 40, 70)]
)
def test_what_lies_between_narrow_filters_is_not_read(r, s, rows, columns):
    """Strides (3, 4): a filter as long as its stride reads everything."""
    sizes = {"n": 2, "c": 3, "h": 40, "w": 70, "k": 11, "p": 13, "q": 17, "itemsize": 1}
    elements = 2 * 3 * rows * columns + 11 * 3 * r * s + 2 * 11 * 13 * 17
    assert cost.conv_bn_relu(**sizes, r=r, s=s, stride=(3, 4)).bytes == elements


def test_floor_is_the_slower_of_arithmetic_and_memory():
    assert cost.Cost(flops=100, bytes=10).floor(10.0, 10.0) == 10.0
    assert cost.Cost(flops=10, bytes=100).floor(10.0, 10.0) == 10.0

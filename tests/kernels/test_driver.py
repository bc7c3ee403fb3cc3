"""What a launch hands to NVIDIA's driver is what was compiled ahead of time, simulated and judged (`tests/driver/`)."""

import os
from pathlib import Path
from shutil import which

import pytest
import torch

pytest.importorskip("triton")

from compiling import oldest, run
from driver import TensorMap

TESTS = Path(__file__).parent.parent

LAUNCH = r"""
import functools, re, struct, sys
from dataclasses import replace
from pathlib import Path
import torch
from driver import MAPS, STREAM, Driver, parameter_sizes
from simulator.memory import TensorMap
from resnet_triton import codegen, models
from resnet_triton.codegen.rows import DTYPES
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import with_base
from resnet_triton.ops.precision import fp32_precision
from resnet_triton.ops.trace import trace

driver = Driver(Path(sys.argv[1]))

@functools.cache
def compile_ahead(source):
    return codegen.triton_compile(source, 90)

def threads(ptx):
    sides = re.search(r"\.reqntid ([\d, ]+)", ptx)[1].split(",")
    return tuple(map(int, sides + ["1"] * (3 - len(sides))))

def on_memory(value):
    '''An argument with memory of its own, untouched.'''
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return with_base(value, on_memory(value.base)) if hasattr(value, "base") else value

def expected(launch):
    '''The parameters, and the boxes that the simulator moves.'''
    parameters, boxes = [], []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            continue
        if isinstance(value, torch.Tensor):
            parameters.append(struct.pack("<Q", value.data_ptr()))
        elif isinstance(value, float):
            parameters.append(struct.pack("<f", value))
        elif isinstance(value, int):
            parameters.append(struct.pack("<i", value))
        else:
            parameters.append(struct.pack("<16Q", MAPS + len(driver.maps) + len(boxes), *[0] * 15))
            parameters += [struct.pack("<i", n) for n in value.shape] + [struct.pack("<q", n) for n in value.strides]
            box = TensorMap(None, 0, value)
            dtype = "tf32" if box.rounds else str(value.base.dtype).removeprefix("torch.")
            strides = [n * box.size for n in value.strides[:-1]]
            boxes.append((dtype, value.base.data_ptr(), list(value.shape), strides, box.box, box.swizzle))
    return parameters + [bytes(8)] * 2, boxes  # and no scratch memory

def check(launch, go):
    '''What `go` hands over against the launch and its kernel, compiled ahead of time.'''
    ahead = compile_ahead(codegen.specialise(launch))
    compiled = launch.compile()
    codes = [kernel.asm["ptx"].partition(".file")[0] for kernel in (ahead, compiled)]  # all but the names of sources
    assert codes[0] == codes[1], launch.kernel
    driver.sizes = parameter_sizes(compiled.asm["ptx"])
    (parameters, boxes), known = expected(launch), len(driver.maps)
    try:
        go()
    finally:
        assert not driver.faults, driver.faults
    told = driver.launched.pop()
    assert not driver.launched
    assert told.kernel == compiled.metadata.name
    assert told.parameters == parameters, (told, parameters)
    assert driver.maps[known:] == boxes, (driver.maps[known:], boxes)
    assert told.grid == (*launch.grid, 1, 1)[:3] and told.threads == threads(ahead.asm["ptx"])
    assert (told.stream, told.dependent, told.other_attributes) == (STREAM, launch.dependent, 0)
    assert told.shared_memory == ahead.metadata.shared
    assert sum(driver.sizes) <= 4096

kernels = set()
for batch, dtype in [case.split() for case in sys.argv[2:]]:
    torch_dtype, precision = DTYPES[dtype]
    with fp32_precision(precision):
        for call in trace(models.resnet18().eval(), (int(batch), 3, 224, 224), torch_dtype):
            for launch in call.launches(KNOWN[90]):
                launch = replace(launch, arguments={n: on_memory(v) for n, v in launch.arguments.items()})
                launch = replace(launch, dependent=launch.is_gluon and batch == "1")  # an attribute, no other code
                check(launch, launch.run)
                kernels.add(launch.kernel.fn.__name__)
                if launch.arguments.get("x_ptr") is not None:
                    other, again = on_memory(launch.arguments["x_ptr"]), launch.repeat("x_ptr")
                    check(replace(launch, arguments=launch.arguments | {"x_ptr": other}), lambda: again(other))
print(*sorted(kernels))
"""


def launched(folder: Path, *cases: str) -> set[str]:
    """The kernels of the launches of some cases, all of which arrive as they should."""
    return set(run(f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{LAUNCH}", str(folder), *cases).split())


needs = pytest.mark.skipif(which("gcc") is None or torch.cuda.is_available(), reason="no gcc, or a driver of its own")


@pytest.mark.slow
@needs
def test_launches_arrive_as_they_are_simulated(tmp_path):
    found = launched(tmp_path, "1 float16", "8 float16", "256 float16", "8 tf32")
    assert {f"hopper_{name}_kernel" for name in ("stem", "few", "conv", "conv64")} <= found
    assert {"conv_box_kernel", "conv_pointer_kernel", "avg_pool_linear_kernel", "max_pool_kernel"} <= found


@pytest.mark.slow
@needs
def test_the_oldest_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(oldest()), os.environ.get("PYTHONPATH")])))
    assert "hopper_few_kernel" in launched(tmp_path, "1 float16")


@pytest.mark.parametrize("other", [
    {"address": 1032}, {"sizes": [2, 2**32 + 1]}, {"sizes": [0, 64]}, {"strides": [136]}, {"strides": [2**40]},
    {"box": [512, 64]}, {"box": [8, 4]}, {"box": [8, 72]}, {"swizzle": 64}, {"sizes": [2] * 6},
])  # fmt: skip
def test_maps_that_the_driver_refuses(other):
    """By its documentation."""
    taken = TensorMap("float16", 1024, [2, 64], [128], [8, 64], 128)
    assert not taken.faults(2)
    assert len(taken._replace(**other).faults(2)) == 1

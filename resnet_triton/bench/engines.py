"""ResNet on engines other than PyTorch's, each only where it is installed. They keep their own streams, so wait."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

Model = Callable[[Tensor], Tensor]


def installed() -> dict[str, Callable[[nn.Module, Tensor], Model]]:
    """Their builders by name."""
    known = {"torch_tensorrt": ("tensorrt", tensorrt), "onnxruntime": ("onnxruntime", onnxruntime), "jax": ("jax", jax)}
    needs = {"onnxruntime": ("onnx", "onnxscript")}
    return dict(
        entry
        for package, entry in known.items()
        if all(importlib.util.find_spec(name) for name in (package, *needs.get(package, ())))
    )


def tensorrt(model: nn.Module, images: Tensor) -> Model:
    """Torch-TensorRT, in the model's dtype."""
    import torch_tensorrt  # noqa: F401  # registers the backend

    del images
    return torch.compile(model, backend="torch_tensorrt", dynamic=False)


def onnxruntime(model: nn.Module, images: Tensor) -> Model:
    """ONNX Runtime on the same device, reading images and writing logits where they are."""
    import numpy as np
    import onnxruntime as ort

    images = images.contiguous()
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False, input_names=["x"], output_names=["y"])
    assert program is not None
    provider = "CUDAExecutionProvider" if images.is_cuda else "CPUExecutionProvider"
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}, expected one for {images.device.type}")
    logits = model(images)
    kind = {torch.float32: np.float32, torch.float16: np.float16}[images.dtype]
    binding = session.io_binding()

    def bind(put: Callable[..., None], name: str, t: Tensor) -> None:
        put(name, t.device.type, t.device.index or 0, kind, tuple(t.shape), t.data_ptr())

    def call(x: Tensor) -> Tensor:
        x, y = x.contiguous(), torch.empty_like(logits)
        bind(binding.bind_input, "x", x)
        bind(binding.bind_output, "y", y)
        if x.is_cuda:
            torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        return y

    return call


def jax(model: nn.Module, images: Tensor) -> Model:
    """JAX, jitted, NHWC, parameters as constants; for basic blocks and bottlenecks of torchvision's form."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take most of the GPU's memory
    import jax.numpy as jnp
    from jax import dlpack, jit, lax
    from jax import nn as jnn

    def constant(t: Tensor) -> Any:
        # A cast in JAX: NumPy has no bfloat16.
        return jnp.asarray(t.detach().float().cpu().numpy()).astype(str(images.dtype).removeprefix("torch."))

    def conv_bn(x: Any, conv: Any, bn: Any) -> Any:
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        pads = [(p, p) for p in conv.padding]
        x = lax.conv_general_dilated(
            x, constant(conv.weight.permute(2, 3, 1, 0)), conv.stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x * constant(scale) + constant(bn.bias - bn.running_mean * scale)

    def forward(x: Any) -> Any:
        m: Any = model
        y = jnn.relu(conv_bn(x, m.conv1, m.bn1))
        pads = ((0, 0), (1, 1), (1, 1), (0, 0))
        y = lax.reduce_window(y, jnp.asarray(-jnp.inf, y.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
        for block in (block for i in range(1, 5) for block in getattr(m, f"layer{i}").children()):
            short = getattr(block, "downsample", None)
            residual = y if short is None else conv_bn(y, *short)
            steps = [n.removeprefix("conv") for n, _ in block.named_children() if n.startswith("conv")]
            for i in steps:
                y = conv_bn(y, getattr(block, f"conv{i}"), getattr(block, f"bn{i}"))
                y = jnn.relu(y + residual if i == steps[-1] else y)
        y = y.mean((1, 2), dtype=jnp.float32).astype(y.dtype)
        return y @ constant(m.fc.weight.T) + constant(m.fc.bias)

    compiled = jit(forward)

    def call(x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        if x.is_cuda:
            torch.cuda.synchronize()
        return from_dlpack(compiled(dlpack.from_dlpack(x)).block_until_ready())

    return call

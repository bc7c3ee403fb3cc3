"""A backend of torch.compile: `torch.compile(model, backend="resnet_triton")`."""

from .compile import resnet_triton

__all__ = ["resnet_triton"]

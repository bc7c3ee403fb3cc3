"""The memory format of filters: kernels read channels_last. A module's `_triton_moved` names those that were moved.

A filter that several models share is moved for all of them, whichever has moved it, and any of them may put it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .graphs.cuda_graph import at_rest, capturing

Filters = Iterable[tuple[str, nn.Parameter]]
Users = Counter[int]
_moved: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
"""What any model has moved, by its id."""


def move(module: nn.Module, filters: Filters, users: Users) -> None:
    """To channels_last memory, those that no other of the `users` has a part in and that are not there already.

    Not while somebody captures: the copy would be made when the graph is replayed, from memory that is free by then.
    """
    found = [(name, w) for name, w in filters if not w.is_contiguous(memory_format=torch.channels_last)]
    found = [(name, w) for name, w in found if not _has_company(w, users) and not capturing(w)]
    with at_rest(weight for _, weight in found):
        for name, weight in found:
            _lay_out(weight, torch.channels_last)
            vars(module).setdefault("_triton_moved", set()).add(name)  # at once, as memory may run out at the next one
            _moved[id(weight)] = weight


def move_back(module: nn.Module, convolutions: Iterable[tuple[str, nn.Module]], users: Users) -> None:
    """Undo `move`, whatever the filters of a convolution are called by now: they may have been parametrized.

    One that has come to share its memory since then stays where it is, and all do while somebody captures.
    """
    weights = ((name, weight) for name, conv in convolutions for weight in conv.parameters())
    found = list(moved(module, ((name, w) for name, w in weights if not is_lazy(w) and w.dim() == 4)))
    if any(map(capturing, found)):
        return
    with at_rest(found):
        for weight in found:
            if not _has_company(weight, users):
                _lay_out(weight, torch.contiguous_format)
                _moved.pop(id(weight), None)
    vars(module).pop("_triton_moved", None)


def moved(module: nn.Module, filters: Filters) -> Iterator[nn.Parameter]:
    """The filters that `move` has moved, for this module or for another one, and nobody has put back."""
    names = vars(module).get("_triton_moved", ())
    ours = (w for name, w in filters if name in names or _moved.get(id(w)) is w)
    return (w for w in ours if w.is_contiguous(memory_format=torch.channels_last))


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 gathers its parameters, each in a place of its own, where it has to stay."""
    return any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)


def users_of(model: nn.Module) -> Users:
    """How many tensors of a model are in which memory: some tie weights by their `data`."""
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}.values()
    return Counter(t.untyped_storage()._cdata for t in tensors if is_plain(t))


def is_plain(t: Tensor) -> bool:
    """Whether it has memory, with elements in it."""
    return not is_lazy(t) and type(t.data) is Tensor and t.layout == torch.strided


def _has_company(weight: nn.Parameter, users: Counter[int]) -> bool:
    """Whether its memory is meant for others too, who would lose it: another tensor, another process, a subclass."""
    if type(weight.data) is not Tensor:
        return True
    memory = weight.untyped_storage()
    if users[memory._cdata] > 1 or memory.nbytes() > weight.nbytes:
        return True
    return weight.device.type == "cpu" and weight.is_shared()


def _lay_out(weight: nn.Parameter, memory_format: torch.memory_format) -> None:
    """Under the mode that the weight was made in, for under inference mode it would become an inference tensor."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = weight.data.contiguous(memory_format=memory_format)

"""A GPU for tests: tensors that say they are on "cuda:0", with their numbers in ordinary memory.

What a real one refuses is refused here: a product of tensors on two devices, a CPU generator for
numbers made on the GPU, a GPU tensor handed to numpy. What a program would wait for until a real
one has computed all that came before is counted. What it computes, with which precision and how
fast, is not imitated.
"""

import contextlib
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# may take a tensor from another device; indices may be on the CPU
CROSSING = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_"}
# the shape of the result, or the result itself, is a number that the program must know
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount",
           "aten::equal", "aten::is_nonzero", "aten::repeat_interleave", "aten::_unique",
           "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::allclose"}


class PretendedStream:
    """Knows for which others it waits."""

    def __init__(self, *_: Any):
        self.waits_for: list[PretendedStream] = []

    def wait_stream(self, other: "PretendedStream") -> None:
        self.waits_for.append(other)


def pinned(part: torch.Tensor) -> torch.Tensor:
    part = part.clone()
    part.is_page_locked = True
    return part


class OnGPU(torch.Tensor):
    """`held`, as the GPU has it. (Below Python it is of device "meta": autograd knows no GPU.)"""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda, is_cpu, is_meta = True, False, False

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGPU":
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta")

    def __init__(self, held: torch.Tensor):
        self.held = held

    def numpy(self, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: PretendedStream) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """While it is entered, what is moved to `GPU` or made there is an `OnGPU`; `ran` counts the
    operations on such tensors by name, `waited` lists those for which a program waits."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[str, int] = {}
        self.waited: list[str] = []
        self.stream = PretendedStream()
        self.has_bfloat16 = False
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "PretendedGPU":
        make = torch.tensor

        def tensor(data: Any, device: Any = None, **options: Any) -> torch.Tensor:
            made = make(data, **options)  # the only factory that no mode sees
            return made if device is None else made.to(device)

        for owner, name, value in (
            (torch, "tensor", tensor),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "Stream", PretendedStream),
            (torch.cuda, "stream", contextlib.nullcontext),
            (torch.cuda, "current_stream", lambda _: self.stream),
            (torch.Tensor, "pin_memory", pinned),
            (torch.cuda, "is_bf16_supported", lambda *_: self.has_bfloat16),
        ):
            self.patches.enter_context(mock.patch.object(owner, name, value))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = run(op, args, kwargs or {})
        if any(isinstance(part, OnGPU) for part in tree_leaves((args, kwargs, result))):
            self.ran[op._schema.name] = self.ran.get(op._schema.name, 0) + 1
            if is_waited_for(op._schema.name, args, kwargs or {}, result):
                self.waited.append(op._schema.name)
        return result


def is_waited_for(name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> bool:
    """Whether a program stands still at this operation until the GPU has come to it."""
    if name in ("aten::_to_copy", "aten::copy_"):
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, OnGPU) and isinstance(result, OnGPU):
            return False
        free = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
        return not (free and hasattr(source, "is_page_locked"))
    if name in ("aten::index", "aten::index_put_"):
        return any(index is not None and (index.dtype in (torch.bool, torch.uint8)
                                          or not isinstance(index, OnGPU)) for index in args[1])
    return name in WAITING


def run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name, leaves = op._schema.name, tree_leaves((args, kwargs))
    tensors = [part for part in leaves if isinstance(part, torch.Tensor)]
    there = [part for part in tensors if isinstance(part, OnGPU)]
    device = kwargs.get("device")
    # "meta": made by an operation's own parts, for a tensor that is there
    is_made_there = device is not None and torch.device(device).type in ("cuda", "meta")
    result_there = is_made_there if device is not None else bool(there)
    if there or is_made_there:
        if any(isinstance(part, torch.Generator) for part in leaves):
            raise RuntimeError(f"{name} on cuda:0 with a generator of the CPU")
        here = [part for part in tensors if not isinstance(part, OnGPU)]
        if there and name not in CROSSING and any(part.dim() for part in here):
            raise RuntimeError(f"{name} of tensors on cuda:0 and on the CPU")
        if there and name in ("aten::index", "aten::index_put_") and not isinstance(args[0], OnGPU):
            raise RuntimeError(f"{name} of a CPU tensor with indices on cuda:0")
    if is_made_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held_args, held_kwargs = tree_map(
        lambda part: part.held if isinstance(part, OnGPU) else part, (args, kwargs))
    result = op(*held_args, **held_kwargs)
    known = {id(part.held): part for part in there}

    def back(part: Any) -> Any:
        if id(part) in known:
            return known[id(part)]  # changed in place
        in_place = any(part is other for other in tensors)
        is_new = isinstance(part, torch.Tensor) and not in_place
        return OnGPU(part) if result_there and is_new else part

    return tree_map(back, result)

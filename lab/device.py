"""A GPU and the program that feeds it: what is sent without waiting, what is read late."""

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def to_device(part: Tensor, device: torch.device) -> Tensor:
    """`part` of the CPU on `device`. A GPU fetches it from pinned memory on a stream of its own,
    while the program goes on and earlier work is still being computed."""
    if device.type != "cuda":
        return part.to(device)
    stream, now = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        moved = part.pin_memory().to(device, non_blocking=True)
    now.wait_stream(stream)
    moved.record_stream(now)  # its memory is used again only after what reads it there
    return moved


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Readings(Mapping[str, float]):
    """Numbers by name, some of them tensors [] that a device may still be computing. The first look
    at any waits for all of them; until then nothing does."""

    def __init__(self, numbers: dict[str, Tensor | float]):
        self.numbers = numbers

    @functools.cached_property
    def read(self) -> dict[str, float]:
        late = [name for name, number in self.numbers.items() if torch.is_tensor(number)]
        found = torch.stack([self.numbers[name].detach().double() for name in late]).tolist()
        return {**self.numbers, **dict(zip(late, found, strict=True))}

    def __getitem__(self, name: str) -> float:
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

"""Weights in the order in which the kernels read them.

packed = arena.copy(panels(weight, 16, form))      # [panels, k, 16]: the 16 weights that multiply one activation
"""

from __future__ import annotations

import mmap
from enum import IntEnum

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


class Format(IntEnum):
    """How the numbers of a packed weight lie, as in product.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    PAIRS = 2


def bfloat16_exact(weight: Tensor) -> bool:
    """Whether bfloat16 holds every number of `weight`."""
    return weight.dtype == torch.bfloat16 or torch.equal(weight.bfloat16().to(weight.dtype), weight)


def panels(weight: Tensor, panel: int, form: Format) -> Tensor:
    """weight [outputs, k] -> [panels, k, panel], padded with zeros.

    BFLOAT16 alternates the two halves of a panel, PAIRS has [panels, k / 2, panel, 2].
    """
    k = weight.shape[1]
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % panel))
    weight = weight.float() if form == Format.FLOAT32 else weight.bfloat16()
    if form == Format.BFLOAT16:
        return weight.view(-1, 2, panel // 2, k).permute(0, 3, 2, 1).flatten(2)
    if form == Format.PAIRS:
        return weight.view(-1, panel, k // 2, 2).transpose(1, 2).flatten(2)
    return weight.view(-1, panel, k).transpose(1, 2)


def vector(x: Tensor, multiple: int = 1) -> Tensor:
    """x in float32, padded with zeros to a multiple."""
    return torch.nn.functional.pad(x.detach().float(), (0, -x.numel() % multiple)).contiguous()


class Arena:
    """Memory for packed weights in huge pages: with small ones, address translation costs a quarter of the speed."""

    BLOCK = 32 << 20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, data: Tensor) -> Tensor:
        """A contiguous copy. A block goes back to the system with the last tensor in it."""
        size = -(-data.numel() * data.element_size() // 64) * 64
        if len(self._free) < size:
            self._free = self._block(max(size, self.BLOCK))
        taken, self._free = self._free[:size], self._free[size:]
        return taken[: data.numel() * data.element_size()].view(data.dtype).view(data.shape).copy_(data)

    @staticmethod
    def _block(size: int) -> Tensor:
        memory = mmap.mmap(-1, size + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.uint8)
        return block[-block.data_ptr() % HUGE_PAGE :][:size]

"""A stand-in for CUDA graphs that is as strict, on a CPU.

It records the operations of one run, with all that Python knew at that time baked in, and repeats them on the same
memory. Reading a tensor while recording fails.
"""

from __future__ import annotations

from torch import Tensor, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from eesd.models.graphs import Rerun

VIEWS = {
    "alias",
    "chunk",
    "detach",
    "expand",
    "expand_as",
    "flatten",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
}
VIEWS |= {"transpose", "unsqueeze", "view"}


class Tape(TorchDispatchMode):
    """Operations of a run in order; played again, they take the tensors of the new run and all else as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not ops.aten._local_scalar_dense.default, "a tensor was read"
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def launches(self) -> list[str]:
        """Operations that are a kernel on a GPU, at one token, where no reshape copies."""
        names = [func.overloadpacket.__name__ for func, *_ in self.steps]
        return [name for name in names if name not in VIEWS]

    def play(self) -> None:
        """Do it again."""
        new: dict[int, Tensor] = {}
        for func, args, kwargs, out in self.steps:
            args, kwargs = tree_map(lambda x: new.get(id(x), x), (args, kwargs))
            pairs = zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True)
            new.update((id(before), after) for before, after in pairs)


class Traced(Rerun):
    """Records as a CUDA graph does: a first run for real, then a run whose operations are kept."""

    def __init__(self) -> None:
        self.recorded: list[Tape] = []

    def capture(self, forward):
        forward()
        self.recorded.append(Tape())
        with self.recorded[-1]:
            forward()
        return self.recorded[-1].play

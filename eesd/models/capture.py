"""CUDA graphs by hand: a function that works on fixed memory, recorded once and replayed by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Replay = Callable[[], Any]


class Rerun:
    """Stands in for CUDA graphs where there are none: what was captured is executed again."""

    name = "graphs (re-executed)"

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""

    def take_turn(self) -> None:
        """Order what follows behind what was replayed before."""

    def capture(self, forward: Replay) -> Replay:
        """A function that repeats what `forward` does to the memory it does it to."""
        forward()
        return forward


class CudaGraphs(Rerun):
    """CUDA graphs of one device. They share one pool: they never run at the same time and keep nothing in it."""

    name = "cuda-graphs"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for warm-up and capture of all graphs, as sharing a pool asks for.
        self.side = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.last: torch.cuda.Stream | None = None

    def wait(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self.device)

    def take_turn(self) -> None:
        """Buffers and pool are shared, so a caller on another stream waits, on the device, for the last one."""
        current = torch.cuda.current_stream(self.device)
        if self.last is not None and current != self.last:
            current.wait_stream(self.last)
        self.last = current

    def capture(self, forward: Replay) -> Replay:
        """Run `forward` once, so that libraries set up what may not be set up during capture; then record it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                forward()
            self.side.synchronize()
            # thread_local: other threads may go on allocating.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                forward()
        return graph.replay

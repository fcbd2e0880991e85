"""CUDA graphs of candidates: their replay is the device's work without the host's."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A function that replays a call; it has compiled and allocated before, on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(_keep: object = result) -> None:  # freed memory of a graph may be given to others
        graph.replay()

    return replay

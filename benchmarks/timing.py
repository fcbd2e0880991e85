"""Timings of several candidates side by side: in turns, in one run, as medians."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from tqdm import tqdm

Call = Callable[[], object]
FEWEST, MOST = 3, 50


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one candidate.

    Attributes:
        seconds: on a GPU the time on the device, launches queued ahead where the candidate allows it; of calls longer than
            50 ms, and on a CPU, the wall time.
        wall: the wall time of the call to the end of its work, the device idle before.
        busy: on a CPU, the processor time of the call, which what else the machine does lengthens less.
        first: the wall time of the very first call, with compilation and allocation.
    """

    first: float
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def time(self) -> float:
        """What ratios are of: the median processor time on a CPU, and the median time on a GPU."""
        return median(self.busy) if self.busy else self.median

    def record(self) -> dict[str, object]:
        """The numbers for a JSON record, in seconds."""
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return {
            "median_s": self.median,
            "quartiles_s": [low, high],
            "wall_median_s": median(self.wall),
            "processor_median_s": median(self.busy) if self.busy else None,
            "first_call_s": self.first,
            "repetitions": len(self.seconds),
        }


class _CPU:
    def wall(self, call: Call) -> float:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # freeing it is not the candidate's work
        return elapsed

    def measure(self, call: Call, timing: Timing) -> None:
        start = time.process_time()
        timing.wall.append(self.wall(call))
        timing.busy.append(time.process_time() - start)
        timing.seconds.append(timing.wall[-1])


class _GPU:
    LONG = 0.05  # seconds; of a longer call the first launch is no part worth mentioning

    def __init__(self, device: torch.device):
        self.device = device
        # Written before each measurement, so that no candidate finds its input in the L2 (50 MB on an H100).
        self.flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)

    def wall(self, call: Call) -> float:
        self.flush.zero_()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize(self.device)
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    def measure(self, call: Call, timing: Timing) -> None:
        timing.wall.append(self.wall(call))
        if timing.wall[-1] > self.LONG:
            timing.seconds.append(timing.wall[-1])
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the device busy for as long as the host needs to launch (no card has more than 2.5e9 cycles a second), so
        # that the events enclose work on the device, not the host. A candidate that waits for the device still shows.
        torch.cuda._sleep(int(timing.wall[-1] * 2.5e9))
        self.flush.zero_()
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        timing.seconds.append(start.elapsed_time(end) / 1e3)


def stopwatch(device: torch.device) -> _CPU | _GPU:
    """What measures a call on this device."""
    return _GPU(device) if device.type == "cuda" else _CPU()


def side_by_side(calls: Mapping[str, Call], device: torch.device, budget: float, label: str) -> dict[str, Timing]:
    """Measure candidates in turns, so that what else the machine does falls on all of them alike.

    Args:
        calls: name → what to call, without arguments.
        device: where the work is done.
        budget: seconds per candidate; 3 to 50 repetitions, evenly spread over the rounds. If others slow the machine down,
            the run ends after twice the time, each candidate having been measured at least 3 times.
        label: of the progress bar.
    """
    watch = stopwatch(device)
    timings, repetitions = {}, {}
    for name, call in tqdm(calls.items(), desc=f"{label}, warming up", leave=False, disable=None):
        first = watch.wall(call)
        timings[name] = Timing(first)
        # The first call compiles; a second one tells more, unless one call is all that the budget has.
        estimate = first if first > budget and device.type == "cpu" else min(first, watch.wall(call))
        repetitions[name] = max(FEWEST, min(MOST, int(budget / estimate)))
    rounds = max(repetitions.values())
    with tqdm(total=sum(repetitions.values()), desc=label, unit="call", leave=False, disable=None) as progress:
        gc.collect()
        gc.disable()  # a collection would fall on whoever happens to run
        try:
            end = time.perf_counter() + 2 * budget * len(calls)
            for i in range(rounds):
                late = time.perf_counter() > end
                for name, call in calls.items():
                    due = (i + 1) * repetitions[name] // rounds > i * repetitions[name] // rounds
                    if len(timings[name].seconds) < FEWEST if late else due:
                        watch.measure(call, timings[name])
                        progress.update()
        finally:
            gc.enable()
    return timings

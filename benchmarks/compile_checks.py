"""What every compiled kernel is held to."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from .compile_configurations import ARCHITECTURES
from .compiled import Compiled

# Kernels that use a stack all the same: (kernel, pattern of configurations, architecture) → bytes per thread at most. All
# that match need one; where one no longer does, its exception has to go. Measured with Triton 3.7.1.
STACK_EXCEPTIONS = {
    # tf32x3 on sm_80 has all operands in registers, split, beside the result: all 255 are in use, and elements that are not
    # aligned are loaded one by one, each from an address of its own.
    ("cross_covariance", "RP 128, *float16, reference float32, unaligned", "sm_80"): 24,
    ("cross_covariance", "RP 128, float32, reference float32, unaligned", "sm_80"): 496,
    ("cross_covariance", "RP 32, *, reference float32, unaligned", "sm_80"): 144,
    # Ditto.
    ("rotate_average", "RP 32, float*, unaligned", "sm_80"): 24,
    ("rotate_average", "RP [48], float16, average float16, unaligned", "sm_80"): 56,
    ("rotate_average", "RP 16, float16, average float16, unaligned", "sm_80"): 56,
    # A few numbers of the whole iteration.
    ("polar_blocked", "RP 64", "sm_80"): 56,
    ("polar_blocked", "RP 128", "sm_80"): 96,
    # With 56 registers in use: not for want of them.
    ("plain_average", "float16, unaligned", "sm_100"): 16,
}


def failures(results: Sequence[Compiled]) -> list[str]:
    """One line for each check that a kernel fails, with kernel, configuration and architecture."""
    found = [f"{_name(result)}: {problem}" for result in results for problem in _problems(result)]
    for (kernel, pattern, architecture), limit in STACK_EXCEPTIONS.items():
        key = (kernel, pattern, architecture)
        matching = [result for result in results if key in _exceptions(result)]
        if not matching:
            found.append(f"{kernel}, {pattern}, {architecture}: exception for no configuration at all")
        unneeded = [result for result in matching if result.resources and result.resources.stack == 0]
        found += [f"{_name(result)}: exception of {limit} bytes of stack, which it no longer needs" for result in unneeded]
    return found


def _problems(result: Compiled) -> Iterator[str]:
    configuration, resources = result.configuration, result.resources
    if resources is None:
        yield f"does not compile: {result.error}"
        return
    if resources.traps:
        yield f"bare trap: {resources.traps} in its code"
    allowed = max((STACK_EXCEPTIONS[key] for key in _exceptions(result)), default=0)
    if resources.stack > allowed:
        yield f"stack: {resources.stack} bytes per thread, {allowed} are allowed"
    if resources.spills:
        yield f"spills: {resources.spills} registers"
    limit = ARCHITECTURES[configuration.architecture].shared
    if resources.shared > limit:
        yield f"shared memory: {resources.shared} bytes, the architecture has {limit}"
    if configuration.aligned and not resources.wide_loads:
        yield f"16-byte loads: none on aligned inputs, the widest is {resources.widest_load} bytes"


def _exceptions(result: Compiled) -> list[tuple[str, str, str]]:
    """The keys of the exceptions that a configuration falls under."""
    c = result.configuration
    return [
        key for key in STACK_EXCEPTIONS if (key[0], key[2]) == (c.kernel, c.architecture) and fnmatchcase(c.title, key[1])
    ]


def _name(result: Compiled) -> str:
    c = result.configuration
    return f"{c.kernel}, {c.title}, {c.architecture}"

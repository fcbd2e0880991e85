"""What a card can do in a second, from its maker's tables; nothing here was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """The rates of one GPU.

    Attributes:
        multiprocessors: how many SMs.
        clock: Hz, under load.
        memory: bytes a second between memory and the L2 cache.
        l2: bytes a second between the L2 cache and the SMs.
        registers: 32-bit registers of an SM.
        shared: bytes of shared memory of an SM; each CTA has 1 KiB more than it asks for.
        warps: the most that an SM holds.
        ctas: the most that an SM holds.
    """

    multiprocessors: int
    clock: float
    memory: float
    l2: float
    registers: int = 65536
    shared: int = 228 * 1024
    warps: int = 64
    ctas: int = 32

    def resident(self, registers: int, warps: int, shared: int) -> int:
        """How many CTAs an SM holds at once, by the registers of a thread, the warps and the shared memory of a CTA."""
        in_registers = self.registers // (-(-registers * 32 // 256) * 256) // warps
        return max(1, min(self.ctas, self.warps // warps, in_registers, self.shared // (shared + 1024)))


CARDS = {
    "H100": Card(multiprocessors=132, clock=1.755e9, memory=3.35e12, l2=5.5e12),
    "H200": Card(multiprocessors=132, clock=1.755e9, memory=4.8e12, l2=5.5e12),
}
# Per clock and SM of sm_90.
WARP_INSTRUCTIONS = 4
SHARED_BYTES = 128  # of shared memory or the L1 cache: one wavefront
SPECIAL_LANES = 16  # of the unit for reciprocals, roots and single conversions
MULTIPLY_ADDS = {"tf32": 1024, "f16": 2048, "bf16": 2048}  # of the tensor cores, by the type of their inputs

"""What the policy's choices are worth: beside every fixed (exit, length) pair and no drafts at all, in virtual time.

`scripts/benchmark.py` measures the same on a real machine, whose time is uneven, and with the time of the policy in
it. Here only what it chooses counts, and what it pays for that: planning, shadow tokens, and drafts that failed.
"""

from dataclasses import dataclass
from itertools import product

import pytest

from tests.draft.virtual_server import VirtualServer, texts
from vllm_del.policy.cost import MeasuredCosts
from vllm_del.policy.predict import predict

LONGEST = 8


@dataclass(frozen=True)
class Machine:
    """A model on a machine: what it costs, its exits, and how often they are right on easy and on hard texts."""

    costs: MeasuredCosts
    depths: tuple[int, ...]
    easy: tuple[float, ...]
    hard: tuple[float, ...]
    # what observing and planning take, seconds
    planning: float

    def rates(self, kind: str, places: int, policies: list[tuple[int, int] | None]) -> list[float]:
        """Tokens a second by each policy, a pair or None for the dynamic one; all serve the same texts."""
        found = []
        for policy in policies:
            server = VirtualServer(self.costs, self.depths, LONGEST, self.planning)
            serves = policy or server.dynamic()
            # It has met the work before, as in a server.
            for seed, number in ((1, 2 * places), (2, max(3 * places, 24))):
                rate = server.rate(texts(kind, self.easy, self.hard, number, seed), places, serves)
            found.append(rate)
        return found


# The synthetic model of a billion parameters, 16 layers, in float32 on two cores without AVX-512: as measured.
CPU_1B = Machine(
    MeasuredCosts(
        step=0.0045,
        rows=(1, 3, 4, 5),
        layer=(0.01, 0.01, 0.0127, 0.0154),
        head_rows=(1, 4, 16),
        head=(0.0085, 0.0112, 0.0222),
        tokens=(1, 2, 3, 4, 6, 7, 8, 12),
        verify=(0.195, 0.2, 0.21, 0.225, 0.234, 0.275, 0.276, 0.328),
        context=256,
    ),
    depths=(3, 5, 8),
    easy=(0.92, 0.925, 0.93),
    hard=(0.02, 0.025, 0.03),
    planning=0.0015,
)
# The same in bfloat16 on two cores with AVX-512, as measured.
CPU_1B_BF16 = Machine(
    MeasuredCosts(
        step=0.0004,
        rows=(1, 6, 8, 12, 16),
        layer=(0.0037, 0.0037, 0.005, 0.0062, 0.0076),
        head_rows=(1, 4, 16, 64, 256, 512),
        head=(0.0031, 0.0031, 0.0067, 0.0222, 0.09, 0.186),
        tokens=(1, 4, 6, 7, 8, 12, 16, 24, 32, 64, 144),
        verify=(0.0574, 0.0574, 0.0611, 0.0735, 0.0788, 0.0948, 0.1148, 0.1595, 0.2091, 0.3743, 0.7924),
        verify_each=9,
        context=256,
        verify_context=3e-6,
        token_context=7e-7,
    ),
    depths=(3, 5, 8),
    easy=(0.92, 0.925, 0.93),
    hard=(0.0, 0.0, 0.0),
    planning=0.0015,
)
# A model of 8 billion parameters, 32 layers, in bfloat16 on a GPU: made up, from the bytes that it reads.
GPU_8B = Machine(
    MeasuredCosts(
        step=0.00005,
        rows=(1, 16, 64),
        layer=(0.00011, 0.000115, 0.00013),
        head_rows=(1, 16, 64, 512),
        head=(0.00026, 0.00027, 0.0003, 0.0008),
        tokens=(1, 16, 64, 128, 256),
        verify=(0.0042, 0.0043, 0.0048, 0.0058, 0.008),
        context=256,
        verify_context=3e-9,
    ),
    depths=(4, 6, 10, 16),
    easy=(0.6, 0.7, 0.85, 0.92),
    hard=(0.02, 0.05, 0.1, 0.3),
    planning=0.0004,
)
# The demo model, 8 layers and 256 wide, in float32 on two cores with AVX-512, as measured: a plan takes most of a step.
CPU_7M = Machine(
    MeasuredCosts(
        step=0.0,
        rows=(1, 2, 3, 4, 8, 16),
        layer=(0.00019, 0.00021, 0.00027, 0.00028, 0.00034, 0.00045),
        head_rows=(1, 4, 16, 64, 512),
        head=(0.00009, 0.00012, 0.00022, 0.0006, 0.0042),
        tokens=(1, 2, 3, 6, 8, 12, 16, 24, 32, 64, 112),
        verify=(0.00149, 0.00152, 0.00152, 0.00168, 0.00195, 0.0022, 0.0026, 0.0033, 0.0035, 0.0058, 0.0091),
        verify_each=7,
        context=256,
        verify_context=3e-7,
    ),
    depths=(2, 4),
    easy=(0.71, 0.87),
    hard=(0.3, 0.4),
    planning=0.001,
)
MACHINES = pytest.mark.parametrize(
    "machine", [CPU_1B, CPU_1B_BF16, GPU_8B], ids=["1B on a CPU", "1B in bfloat16", "8B on a GPU"]
)


def pairs(machine: Machine) -> list[tuple[int, int]]:
    return list(product(range(len(machine.depths)), range(1, LONGEST + 1)))


@MACHINES
@pytest.mark.parametrize("places", [1, 4, 8])
def test_texts_that_are_alike_are_served_as_by_the_best_pair(machine: Machine, places: int) -> None:
    off, dynamic, *fixed = machine.rates("easy", places, [(0, 0), None, *pairs(machine)])
    assert dynamic > 0.97 * max(off, *fixed)
    allowed = predict(machine.costs, list(machine.depths), list(machine.easy), LONGEST, places, 96).speed_up
    assert dynamic > 0.9 * allowed * off


@MACHINES
@pytest.mark.parametrize("places", [1, 4, 16])
def test_where_nothing_is_to_be_had_next_to_nothing_is_lost(machine: Machine, places: int) -> None:
    off, dynamic = machine.rates("hard", places, [(0, 0), None])
    assert dynamic > 0.97 * off


@pytest.mark.parametrize("kind", ["hard", "mixed"])
@pytest.mark.parametrize("places", [4, 16])
def test_what_choosing_takes_is_kept_small_as_sequences_come_and_go(kind: str, places: int) -> None:
    """Where a plan for each batch would take a tenth of the time."""
    off, dynamic = CPU_7M.rates(kind, places, [(0, 0), None])
    assert dynamic > 0.96 * off


@pytest.mark.parametrize(
    ("machine", "at_least"),
    # On a GPU drafts of hard texts beside easy ones cost next to nothing, so there is nothing to be had.
    [(CPU_1B, 1.05), (GPU_8B, 0.97)],
    ids=["1B on a CPU", "8B on a GPU"],
)
def test_easy_and_hard_texts_side_by_side(machine: Machine, at_least: float) -> None:
    off, dynamic, *fixed = machine.rates("mixed", 4, [(0, 0), None, *pairs(machine)])
    assert dynamic > at_least * max(fixed)
    assert dynamic > 0.97 * off

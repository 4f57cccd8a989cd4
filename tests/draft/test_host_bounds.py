"""What the host knows of the plans: two rounds late, and the same for whoever asks in the same round."""

import torch

from vllm_del.draft.decide import HostBounds


def test_two_rounds_late() -> None:
    bounds = HostBounds(3, 8, torch.device("cpu"))
    plans = [(0, 0), (1, 4), (2, 6), (0, 1)]
    known = [tuple(bounds.exchange(torch.tensor(plan))) for plan in plans]
    assert known == [(3, 8), (3, 8), (0, 0), (1, 4)]

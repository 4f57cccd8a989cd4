"""What the host knows of the device."""

import torch

from vllm_del.draft.clock import Late


def test_values_come_two_rounds_late_with_their_notes() -> None:
    late = Late(first=(3, 8))
    seen = [late.exchange(torch.tensor(wanted), str(wanted)) for wanted in ((0, 1), (2, 2), (1, 8), (0, 0), (3, 5))]
    assert seen == [((3, 8), None), ((3, 8), None), ([0, 1], "(0, 1)"), ([2, 2], "(2, 2)"), ([1, 8], "(1, 8)")]


def test_what_is_written_over_afterwards_does_not_change_them() -> None:
    late, values = Late(first=None), torch.tensor([1])
    late.exchange(values)
    values.fill_(9)
    late.exchange(values)
    assert late.exchange(values) == ([1], None)

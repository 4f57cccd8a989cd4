"""A choice goes with its sequences into the batches that theirs turns into; who comes gets that of a stranger."""

import numpy as np
import torch

from vllm_del.draft.choice import Choice
from vllm_del.draft.together import Together

NUM_SLOTS, EXITS = 9, 2


def choice(slots: list[int], lengths: list[int], on_host: bool = True) -> Choice:
    """Each row's values tell which row it is; the last one is the stranger's."""
    rows = len(slots) + 1
    number = torch.arange(rows)
    by_exit = torch.stack((number, number + 100), 1)
    each = [np.arange(rows) + offset for offset in (0.0, 10.0, 20.0, 30.0, 40.0)]
    together = Together(*each, shared=0.5, survived=np.zeros(rows)) if on_host else None
    return Choice(
        torch.tensor(slots), number % EXITS, torch.tensor(lengths), by_exit.float(), by_exit.double(), together
    )


def test_every_sequence_keeps_what_was_chosen_for_it() -> None:
    before, slots = choice([3, 1, 7], [5, 4, 2, 1]), torch.tensor([8, 7, 3])
    after = before.of(slots, None, NUM_SLOTS)
    assert after.slots is slots
    # Slot 8 was not in the batch, and 1 has left it.
    rows = [3, 2, 0, 3]
    assert after.length.tolist() == [1, 2, 5, 1]
    assert torch.equal(after.exit, before.exit[rows])
    assert torch.equal(after.stop_below, before.stop_below[rows])
    assert torch.equal(after.acceptance, before.acceptance[rows])
    assert after.together is not None
    assert after.together.itself.tolist() == [43, 42, 40, 43]
    # And so on, in the batch after that one.
    again = after.of(torch.tensor([3, 8]), None, NUM_SLOTS)
    assert again.length.tolist() == [5, 1, 1]


def test_another_sequence_in_a_slot_is_a_stranger() -> None:
    after = choice([3, 1, 7], [5, 4, 2, 1]).of(torch.tensor([3, 1]), torch.tensor([1]), NUM_SLOTS)
    assert after.length.tolist() == [5, 1, 1]


def test_idle_is_a_batch_of_which_no_row_drafts() -> None:
    one = choice([3, 1], [2, 0, 1])
    assert not one.idle
    assert one.of(torch.tensor([1]), None, NUM_SLOTS).idle
    assert not one.of(torch.tensor([1, 4]), None, NUM_SLOTS).idle
    # Where the host does not see the device's values it cannot know.
    assert not choice([3, 1], [0, 0, 0], on_host=False).idle


def test_what_a_step_brings_is_asked_of_the_batch_alone() -> None:
    together = choice([3, 1], [2, 0, 1]).together
    assert together is not None
    begun = together.begin(2)
    assert begun.itself.tolist() == [40, 41]
    assert begun.survived.tolist() == [1, 1]
    assert begun.shared == 0.5

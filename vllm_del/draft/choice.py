"""What was chosen for a batch, for as long as it serves: also as sequences end and others take their places."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from vllm_del.draft.together import Together


@dataclass
class Choice:
    """What is best for some sequences, and for one that may yet come: tensors on the model's device.

    All but `slots` have a last row beyond those of the batch, of a sequence of which nothing is known.
    """

    # [rows] int64: of whom
    slots: torch.Tensor
    # [rows + 1] int64 each: after which segment they leave, and how long their drafts are
    exit: torch.Tensor
    length: torch.Tensor
    # [rows + 1, exits] float32: as `Plan` has it of one exit
    stop_below: torch.Tensor
    # [rows + 1, exits] float64: what acceptance is expected
    acceptance: torch.Tensor
    # of the same rows, where the host sees the device's values
    together: Together | None = None
    # whether the host knows that nothing is drafted: at once where it sees that, else some rounds later
    idle: bool = field(init=False)

    def __post_init__(self) -> None:
        self.idle = self.together is not None and not self.length[:-1].any()

    def of(
        self,
        # [rows of another batch] int64
        slots: torch.Tensor,
        # of these the places of sequences that were in no batch before: another one may have had their slot
        fresh: torch.Tensor | None,
        num_slots: int,
    ) -> "Choice":
        """The same for a batch that this one has turned into."""
        stranger = len(self.slots)
        row_of = torch.full((num_slots,), stranger, device=slots.device)
        row_of.index_copy_(0, self.slots, torch.arange(stranger, device=slots.device))
        if fresh is not None:
            row_of.index_fill_(0, fresh, stranger)
        index = pad(row_of[slots], (0, 1), value=stranger)
        return Choice(
            slots,
            self.exit[index],
            self.length[index],
            self.stop_below[index],
            self.acceptance[index],
            self.together and self.together.take(index),
        )

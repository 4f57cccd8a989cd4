"""`exit_rows` in plain torch."""

import torch


def exit_rows(
    # [rows, hidden size], any type: of all rows, what a segment of layers gives
    states: torch.Tensor,
    # [rows] int64: the segment after which each row leaves
    exit: torch.Tensor,
    # of this segment
    index: int,
    # [rows, hidden size], the type of `states`: what the LM head is to read of each row
    taken: torch.Tensor,
) -> None:
    """Copy the rows that leave here to their places in `taken`; the others there stay as they are."""
    torch.where((exit == index).unsqueeze(1), states, taken, out=taken)

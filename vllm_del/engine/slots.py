"""Places for what is remembered of each request: kept while the request lives, preempted or in any row of the batch."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from vllm_del.draft.upload import upload


class Slots:
    """Slot numbers by request id. The one not used for longest is given away when all are taken."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self._device = device
        self._free = list(range(number))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._last: tuple[list[str], torch.Tensor] = ([], torch.empty(0, dtype=torch.int64, device=device))
        # Of the last call: rows whose requests had no slot before; and beside the call before that one, how many
        # requests came and how many left
        self.new_rows: list[int] = []
        self.came = self.left = 0

    def of(self, request_ids: Sequence[str]) -> torch.Tensor:
        """The slots of these requests, [rows] int64. There are never more of them than slots."""
        self.new_rows, self.came, self.left = [], 0, 0
        if self._last[0] != request_ids:
            stayed = len(set(request_ids).intersection(self._last[0]))
            self.came, self.left = len(request_ids) - stayed, len(self._last[0]) - stayed
            for row, request_id in enumerate(request_ids):
                if request_id not in self._slots:
                    self._slots[request_id] = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
                    self.new_rows.append(row)
                self._slots.move_to_end(request_id)
            slots = [self._slots[request_id] for request_id in request_ids]
            self._last = list(request_ids), upload(slots, self._device)
        return self._last[1]

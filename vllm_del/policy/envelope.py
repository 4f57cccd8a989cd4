"""What the paged KV cache, and a sequence's own end, leave for drafts: how many tokens each may draft in a round.

A draft writes KV in slots beyond the sequence's last token. Within the blocks that a sequence holds anyway they cost
nothing; another block for them is taken only while there are plenty. So drafts get shorter as free blocks get fewer,
and do not take from another sequence the block that it needs to go on.
"""

from collections.abc import Iterable
from dataclasses import dataclass


def longest_draft(wish: int, still_wanted: int) -> int:
    """The longest draft that can be used, of a sequence that wants so many more tokens: one comes from verification."""
    return max(0, min(wish, still_wanted - 1))


def slots_for(length: int, ahead: int) -> int:
    """Slots beyond the last token that a draft of `length` tokens needs, until its fate is known.

    The steps write one less; the last token's slot is for the verification, which must not want a block then. Nor must
    the `ahead` steps that are scheduled before that is done, and as if all were accepted: rejected, none was needed.
    """
    return length + 1 + ahead if length else 0


def longest_in_room(wish: int, room: int, ahead: int) -> int:
    """The longest draft that fits in `room` slots."""
    return max(0, min(wish, room - 1 - ahead))


def steps_to_fill(longest: int, ahead: int) -> int:
    """How many steps it takes at most until a block that a draft of `longest` tokens took is the sequence's own.

    Each brings one token at least. The block begins at the last of the draft's slots or before; and as many tokens as
    are being verified when it is taken, now and in the `ahead` steps, may come to nothing.
    """
    return slots_for(longest, ahead) + longest * (1 + ahead)


def room_in_blocks(
    end: int,
    # of each KV cache group: the blocks that the sequence holds, and the tokens in a block
    held: Iterable[tuple[int, int]],
) -> int:
    """Slots after position `end` in blocks that a sequence holds, or has to take for its tokens up to `end`."""
    return min(max(blocks, -(-end // size)) * size for blocks, size in held) - end


@dataclass
class Reserve:
    """Blocks that drafts and newcomers have to leave to the sequences that run.

    A block taken for drafts is filled by the sequence's own tokens a few steps later, as every step brings one at
    least. Until then the others may come to the end of their blocks too: so many have to be there for them. A newcomer
    must not take these; and while one waits for them, no block is taken for drafts, and soon it need not wait.
    """

    # blocks left to each sequence, over all KV cache groups: as the longest draft takes, hardly ever fewer than needed
    blocks_per_sequence: int
    # how many steps it takes to fill what was taken for drafts
    steps: int
    _step: int = 0
    _taken_at: int = -(1 << 60)
    _waited: bool = False
    _waits: bool = False

    def begin_step(self) -> None:
        """Another step is scheduled."""
        self._step += 1
        self._waited, self._waits = self._waits, False

    def for_drafts(self, num_running: int) -> int | None:
        """Blocks to leave free when drafts take one; `None` if they must take none."""
        return None if self._waited else num_running * self.blocks_per_sequence

    def for_newcomer(self, num_running: int) -> int:
        """Blocks to leave free when a sequence is let in."""
        return num_running * self.blocks_per_sequence if self._step - self._taken_at <= self.steps else 0

    def taken(self) -> None:
        """Drafts have taken a block."""
        self._taken_at = self._step

    def newcomer_waits(self) -> None:
        """One was kept out by the reserve."""
        self._waits = True

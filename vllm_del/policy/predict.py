"""What drafting is going to bring, from measured costs and acceptance rates: the planner asked without serving."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_del.policy.cost import Correction, CostTables, MeasuredCosts
from vllm_del.policy.planner import Planner

ROUNDS = 8
"""Plans until the price of time has settled."""

WORTH_WHILE = 1.03
"""A predicted speed-up below which drafting is not advised."""


@dataclass(frozen=True)
class Prediction:
    """Of a batch of sequences that are alike."""

    batch: int
    # tokens a second without drafts, and with the best plan
    without: float
    best: float
    # the plan: layers run for a draft, and its length; 0 for none
    depth: int
    length: int

    @property
    def speed_up(self) -> float:
        """1 where nothing is drafted."""
        return self.best / self.without


@dataclass(frozen=True)
class ExitProfile:
    """Of one exit over all tokens that it was asked at."""

    depth: int
    asked: int
    # how often its token was the model's, and its mean probability where it was and where it was not; NaN for never
    agreement: float
    confidence_right: float
    confidence_wrong: float
    # the agreement through all of the model's head, if drafts go through less of it
    whole_head: float | None = None


@dataclass(frozen=True)
class Profile:
    """What a model's early layers are good for on this machine."""

    model: str
    num_layers: int
    max_length: int
    # tokens generated, and the mean context they were generated in
    tokens: int
    context: int
    exits: list[ExitProfile]
    costs: MeasuredCosts
    # what the clock said of them while the model decoded
    correction: Correction = field(default_factory=Correction)
    # fields of the configuration that say which head drafts go through
    head: dict[str, str | int] = field(default_factory=dict)

    def predictions(self, batches: Sequence[int]) -> list[Prediction]:
        """The best plan for each batch size."""
        depths, rates = [exit.depth for exit in self.exits], [exit.agreement for exit in self.exits]
        of_model = self.costs, depths, rates, self.max_length
        return [predict(*of_model, batch, self.context, self.correction) for batch in batches]

    def configuration(self, batches: Sequence[int]) -> dict[str, object] | None:
        """What to serve these batch sizes with; `None` if drafting pays in none of them."""
        drafting = [found for found in self.predictions(batches) if found.length and found.speed_up > WORTH_WHILE]
        if not drafting:
            return None
        return {
            "method": "del",
            "num_speculative_tokens": max(found.length for found in drafting),
            "del_exit_layers": sorted({found.depth for found in drafting}),
            **self.head,
        }


def predict(
    costs: MeasuredCosts,
    depths: Sequence[int],
    # by exit
    acceptance: Sequence[float],
    max_length: int,
    batch: int,
    context: int,
    correction: Correction | None = None,
) -> Prediction:
    """The best plan for `batch` sequences of these acceptance rates, with contexts of so many tokens.

    Without a `correction` the tables alone are what a round takes.
    """
    cpu = torch.device("cpu")
    tables = CostTables(costs, batch, max_length, cpu)
    tables.correction = of = correction or Correction()
    planner = Planner(torch.tensor(depths), tables, max_length)
    rates = torch.tensor([list(acceptance)] * batch, dtype=torch.float64)
    limit, contexts = torch.full((batch,), max_length), torch.full((batch,), context)
    for _ in range(ROUNDS):
        decision = planner.plan(rates, limit, contexts)
    length = int(decision.length.max())
    row = int(decision.length.argmax())
    return Prediction(
        batch=batch,
        without=batch / (of.verify * tables.verify_seconds(batch, context * batch) + of.overhead),
        # The planner's times are those of a machine that verifies as the tables say.
        best=float(decision.tokens / (decision.draft_time + decision.verify_time)) / of.verify,
        depth=depths[int(decision.exit[row])] if length else 0,
        length=length,
    )

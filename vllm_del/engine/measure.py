"""Measures at start what the parts of a round cost on this machine, or reads what an earlier start measured.

The same draft steps and forward passes as in service, over made-up rows. Under tensor parallelism all ranks run them
together, and all take the first rank's figures, so that they plan alike.
"""

import hashlib
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from vllm_del.draft.decide import DynamicPolicy
from vllm_del.draft.verified import Verified
from vllm_del.engine.rehearsal import Rehearsal
from vllm_del.policy.cost import SHADOW_ROWS, MeasuredCosts, split_steps

logger = init_logger(f"vllm.{__name__}")

FORMAT = 10
"""Of the file; another one is not read."""

REPEATS = (2, 8)
SECONDS_EACH = 0.25
"""A time is taken so often, or for so long."""

VISITS = 2
"""Tables are gone through so often, from the first place to the last: a machine that is slower for some seconds is so
for a part of a table, and what is then wrong of its shape no clock corrects later."""

BUSY = 1.5
"""Costs that are so many times too large are measured again."""

LONGEST_SECONDS, BETWEEN_SECONDS = 4.0, 2.0
"""No larger batch is tried once the first visit of one table has taken this long; what is larger costs in proportion.
And how much longer it may take for what is between those that were tried."""


def costs_of(vllm_config: VllmConfig, rehearsal: Rehearsal, exits: list[int]) -> MeasuredCosts:
    """The costs of this model here: saved ones, else measured now and saved."""
    saved = _path(vllm_config, rehearsal.head_text)
    measured = None
    try:
        measured = MeasuredCosts.from_json(saved.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("del: %s is no table of costs (%s): measuring again", saved, error)
    # Ranks may see different files: they measure together or not at all.
    measured = get_tp_group().broadcast_object(measured, src=0)
    if measured is not None:
        if not _takes_less_now(measured, rehearsal, exits):
            logger.info_once("del: costs of a round read from %s", saved)
            return measured
        logger.info_once("del: a round takes much less than %s says: measuring again", saved)
    begin = time.perf_counter()
    measured = get_tp_group().broadcast_object(_measure(vllm_config, rehearsal, exits), src=0)
    logger.info_once("del: costs of a round measured in %.1f s: %s", time.perf_counter() - begin, saved)
    try:
        saved.parent.mkdir(parents=True, exist_ok=True)
        # Other ranks and other servers may write it too: each a whole one.
        with NamedTemporaryFile("w", dir=saved.parent, delete=False) as partial:
            partial.write(measured.to_json())
        Path(partial.name).chmod(0o644)  # others of this machine may read them
        Path(partial.name).replace(saved)
    except OSError as error:
        logger.warning("del: the costs are not kept for the next start: %s", error)
    return measured


def _takes_less_now(saved: MeasuredCosts, rehearsal: Rehearsal, exits: list[int]) -> bool:
    """Whether a draft step, or a verification, of one sequence takes much less than was saved: then what else the
    machine did was measured too."""
    rows, tokens, context = saved.rows[0], saved.tokens[0], saved.context
    draft = _seconds(rehearsal.drafting(rows, len(exits), context)) / rehearsal.steps
    verify = _seconds(lambda: rehearsal.verify(tokens, saved.verify_each, context))
    draft_saved = saved.step + exits[-1] * saved.layer[0] + saved.head[0]
    less = draft_saved > BUSY * draft or saved.verify[0] > BUSY * verify
    return bool(get_tp_group().broadcast_object(less, src=0))


def planning_seconds(policy: DynamicPolicy, rows: int, device: torch.device) -> float:
    """What `policy` takes to observe and plan a round of so many rows, on the host as on the device."""
    slots, zeros = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    verified = Verified(
        states=[],
        input_ids=zeros,
        start=zeros,
        drafted=zeros,
        accepted=zeros,
        next_token=zeros,
        sampled=zeros == 0,
        longest=policy.max_length,
        num_tokens=0,  # earns nothing for shadow tokens, so that none are scored
        contexts=0,
        only_decodes=True,
        came=0,
        left=0,
        ended=[],
        fresh=[],
    )

    def plan() -> None:
        policy.observe(slots, verified)
        policy.plan(slots, zeros + policy.max_length, zeros + policy.max_length, zeros)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return get_tp_group().broadcast_object(_seconds(plan), src=0)


def _measure(vllm_config: VllmConfig, rehearsal: Rehearsal, exits: list[int]) -> MeasuredCosts:
    config = vllm_config.scheduler_config
    each, near, far = rehearsal.verify_each, rehearsal.context, rehearsal.long_context

    after_drafts = rehearsal.drafting(1, len(exits), near)

    def head_seconds(rows: int, visit: int) -> list[float]:
        return [_seconds(lambda: rehearsal.head(rows), after_drafts, visit) / rehearsal.at_once]

    def draft_seconds(rows: int, visit: int) -> list[float]:
        """Of a draft step to the first exit, and to the last one."""
        return [_seconds(rehearsal.drafting(rows, n, near), visit=visit) / rehearsal.steps for n in (1, len(exits))]

    def verify_seconds(tokens: int, visit: int) -> list[float]:
        return [_seconds(lambda: rehearsal.verify(tokens, each, near), visit=visit)]

    length = vllm_config.num_speculative_tokens
    most = min(config.max_num_seqs * (1 + length), config.max_num_batched_tokens)
    (head_rows, head), (rows, steps), (tokens, verify) = _tables(
        (head_seconds, _places(max(SHADOW_ROWS, config.max_num_seqs), factor=4), ()),
        (draft_seconds, _places(config.max_num_seqs), _between()),
        (verify_seconds, _places(most), _between()),
    )
    heads = np.interp(rows, head_rows, head[:, 0])
    shallow, deep = np.maximum(steps.T - heads, steps.T / 10)
    step, layer = split_steps(shallow, deep, exits)
    measured = MeasuredCosts(
        step=step,
        rows=tuple(rows),
        layer=tuple(layer),
        head_rows=tuple(head_rows),
        head=tuple(head[:, 0].tolist()),
        tokens=tuple(tokens),
        verify=tuple(verify[:, 0].tolist()),
        verify_each=each,
        context=near,
    )
    if rehearsal.even and each < most and config.max_num_seqs > 1:
        # With a row of one token more, which costs little itself.
        apart, alike = (_seconds(partial(rehearsal.verify, number, each, near)) for number in (each + 1, each))
        measured = measured.with_uneven(max(0.0, apart - alike))
    if far < 2 * near or each == 1:
        return measured

    number = min(4, config.max_num_seqs, most // each)

    def of_context(run: Callable[[int], Callable[[], float | None]]) -> float:
        """Seconds for a row and a token more of its context, in what there is to run for a context."""
        more = _seconds(run(far)) - _seconds(run(near))
        return max(0.0, more) / (number * (far - near))

    in_step = of_context(partial(rehearsal.drafting, number, len(exits))) / rehearsal.steps
    alone = of_context(partial(partial, rehearsal.verify, number, 1))
    with_drafts = of_context(partial(partial, rehearsal.verify, number * each, each))
    return replace(
        measured,
        layer_context=in_step / exits[-1],
        verify_context=alone,
        token_context=max(0.0, with_drafts - alone) / (each - 1),
    )


def _tables(
    # of each: what takes the times at a place in one visit, growing places, and more that are between these
    *each: tuple[Callable[[int, int], list[float]], Iterable[int], Iterable[int]],
) -> list[tuple[list[int], np.ndarray]]:
    """Places, as many as the time for a table allows, and the shortest times there, [places, times]."""
    found = [_first_visit(*of) for of in each]
    for visit in range(1, VISITS):
        for (seconds, *_), values in zip(each, found, strict=True):
            for place, before in values.items():
                values[place] = list(map(min, before, seconds(place, visit)))
    return [(sorted(values), np.array([values[place] for place in sorted(values)])) for values in found]


def _first_visit(
    seconds: Callable[[int, int], list[float]], places: Iterable[int], between: Iterable[int]
) -> dict[int, list[float]]:
    """The times at each of the growing `places`, as far as the time for it goes, and then at those `between`."""
    values, begin = {}, time.perf_counter()
    for place in places:
        values[place] = seconds(place, 0)
        if _since(begin) > LONGEST_SECONDS:
            break
    last = max(values)
    for place in between:
        if place >= last or _since(begin) > LONGEST_SECONDS + BETWEEN_SECONDS:
            break
        values[place] = seconds(place, 0)
    return values


def _since(begin: float) -> float:
    """Seconds that have gone by, on which all ranks agree."""
    return get_tp_group().broadcast_object(time.perf_counter() - begin, src=0)


def _places(most: int, factor: int = 2) -> Iterator[int]:
    """1 and the powers of `factor`, and `most`."""
    place = 1
    while place < most:
        yield place
        place *= factor
    yield most


def _between() -> Iterator[int]:
    """What is between powers of two, in the order of what it is worth: 3, 5, 6, 7, 12, 24, 48, ...

    Few rows or tokens are what most rounds are of, and libraries for CPUs take them in blocks of their own: the sixth
    may cost nothing and the seventh as much as three.
    """
    yield from (3, 5, 6, 7)
    place = 12
    while True:
        yield place
        place *= 2


def _seconds(
    run: Callable[[], float | None], before: Callable[[], None] = lambda: None, visit: int | None = None
) -> float:
    """The shortest time of `run`: what else the machine did only adds to it. The host's clock tells, unless `run` does.

    After a first time that does not count, if this is the only visit or the first one, `visit` 0. As often as fits in
    `SECONDS_EACH`, within limits; in each of several visits a part of that; all ranks as often as the first one.
    `before` is what comes before it in service: run over and over, a part of a model finds its weights in the caches
    of a CPU, and takes half as long.
    """

    def timed() -> float:
        before()
        begin = time.perf_counter()
        by_device = run()
        return time.perf_counter() - begin if by_device is None else by_device

    first = get_tp_group().broadcast_object(timed(), src=0)
    fewest, most = REPEATS
    number = max(fewest, min(most, int(SECONDS_EACH / max(first, 1e-9))))
    if visit is not None:
        number = -(-number // VISITS)
    if visit:
        return min([first, *(timed() for _ in range(number - 1))])
    return min(timed() for _ in range(number))


def _path(vllm_config: VllmConfig, head: str) -> Path:
    """Where the costs are saved: another model, dtype, setting, machine or version has another file."""
    parts = (
        FORMAT,
        vllm_config.compute_hash(),
        vllm_config.num_speculative_tokens,
        head,
        vllm_config.use_v2_model_runner,
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm.__version__,
        version("vllm-del"),
        machine(),
    )
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    # So that one is found to be deleted.
    model = re.sub(r"[^\w.-]", "-", Path(vllm_config.model_config.model).name)
    return Path(envs.VLLM_CACHE_ROOT) / "vllm_del" / f"costs-{model}-{digest}.json"


def machine() -> str:
    """What computes here. Not the machine's name, which is another one in each container."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    # Libraries that tell it take a second, by starting other programs.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"

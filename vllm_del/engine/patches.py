"""The ledger: every place where vLLM is patched, why, and what upstream change would end it.

Each entry is one small function that gets the original first, and hands on what it does not know. They leave vLLM as
it is for anyone who does not ask for `del`; those of `faults` mend it in a process whose runner did ask. vLLM has no
registry for speculators from outside its tree (RFCs vllm-project/vllm#36219 and #51212, both open); with one, the
entries marked [registry] go.
"""

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.config import SchedulerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_del.asking import as_fields, asks_for_del
from vllm_del.config import DelConfig
from vllm_del.engine.command_line import accept_del
from vllm_del.engine.support import check_supported
from vllm_del.engine.wrap import wrap
from vllm_del.wishes import longest_wished

logger = init_logger(f"vllm.{__name__}")

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

OUR_SCHEDULERS = "vllm_del.engine.scheduler"


def apply() -> None:
    """Apply what a process needs before it knows whether `del` is asked for. Idempotent.

    Raises `AttributeError` or `ImportError`, before `EngineArgs` is touched, where vLLM is not as it has to be.
    """
    if "vllm.v1.worker.worker_base" in sys.modules:
        _watch_workers()
    patches: tuple[tuple[type, str, Callable], ...] = (
        (SamplingParams, "_validate_spec_decode", _validate_wishes),
        (SchedulerConfig, "get_scheduler_cls", _choose_our_scheduler),
        (EngineArgs, "create_speculative_config", _build_del_config),
        (EngineArgs, "create_engine_config", _expand_the_word_and_check),
        (EngineArgs, "add_cli_args", accept_del),
    )
    for patch in patches:
        wrap(*patch)


def _watch_workers() -> None:
    """Called where there are workers, or `del` is asked for: the module is too large to import for anyone else."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(WorkerWrapperBase, "init_device", _install_the_drafter)


def _watch_statistics() -> None:
    """As `_watch_workers`, in the process that the engine's output comes to, which is the one that asks."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    wrap(StatLoggerManager, "__init__", _count_for_prometheus)


def _expand_the_word_and_check(original: Callable, self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
    """[registry] `LLM(speculative_config="del")`, and the refusal of what `del` cannot serve.

    Why: vLLM takes a dict here, and checks its own methods only. Checked after the whole configuration
    exists and before any process starts, so that a refusal is one error in the user's own process.
    """
    given = self.speculative_config = as_fields(self.speculative_config)
    if isinstance(given, (str, list, tuple)):
        raise ValueError(f"speculative_config={given!r} is not understood: give 'del', or a dict of its fields")
    vllm_config = original(self, *args, **kwargs)
    if isinstance(vllm_config.speculative_config, DelConfig):
        check_supported(vllm_config)
        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls is None:
            name = "DelAsyncScheduler" if scheduler.async_scheduling else "DelScheduler"
            scheduler.scheduler_cls = f"{OUR_SCHEDULERS}.{name}"
        else:
            logger.warning(
                "del: scheduler_cls=%r sizes no drafts: the KV cache holds room for the largest, what requests say "
                "about del is not heeded, and vllm:del_* metrics stay empty",
                scheduler.scheduler_cls,
            )
    return vllm_config


def _choose_our_scheduler(original: Callable, self: SchedulerConfig) -> type:
    """[registry] The scheduler that sizes drafts by the KV cache, without a word.

    Why: of a scheduler that is not its own vLLM says that asynchronous scheduling may be off, which it is not.
    """
    if isinstance(self.scheduler_cls, str) and self.scheduler_cls.startswith(OUR_SCHEDULERS):
        return resolve_obj_by_qualname(self.scheduler_cls)
    return original(self)


def _validate_wishes(original: Callable, self: SamplingParams, speculative_config: Any) -> None:
    """[registry] A bad wish of one request is an error of that request, in the process that took it.

    Why: vLLM leaves `extra_args` to plugins, and asks none.
    """
    original(self, speculative_config)
    if isinstance(speculative_config, DelConfig):
        try:
            longest_wished(self.extra_args, speculative_config.num_speculative_tokens)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="extra_args") from None


def _build_del_config(original: Callable, self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
    """[registry] `method: "del"` becomes a DelConfig.

    Why: vLLM builds its own SpeculativeConfig, whose `method` is a closed Literal.
    """
    if not asks_for_del(self.speculative_config, self.spec_method):
        return original(self, *args, **kwargs)
    _watch_workers()
    _watch_statistics()
    if self.spec_model is not None:
        raise ValueError(f"--spec-model {self.spec_model!r}: method 'del' drafts with the served model; leave it out")
    given = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
    for flag, key, value in (
        ("--spec-method", "method", self.spec_method),
        ("--spec-tokens", "num_speculative_tokens", self.spec_tokens),
    ):
        if value is not None and key in given:
            raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive: give one")
        if value is not None:
            given[key] = value
    for name in ("target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config"):
        if given.get(name) is not None:
            raise ValueError(f"{name}={given[name]!r}: method 'del' takes it from the served model; leave it out")
    engine_gives = inspect.signature(original).bind(self, *args, **kwargs).arguments
    given["target_model_config"] = engine_gives["target_model_config"]
    given["target_parallel_config"] = engine_gives["target_parallel_config"]
    return DelConfig(**given)


def _install_the_drafter(original: Callable, self: "WorkerWrapperBase", *args: Any, **kwargs: Any) -> None:
    """[registry] The worker's model runner gets our drafter when, and only when, its config is a DelConfig.

    Why here: it is the last call before a runner is built, in every kind of worker process, and the first
    that knows the configuration; so a runner's module is imported only by a worker that uses it.
    """
    config = self.vllm_config
    assert config is not None
    if isinstance(config.speculative_config, DelConfig):
        from vllm_del.engine.faults import expand_for_any_dtype, keep_to_the_graph, sample_as_without_drafts

        # Before vLLM itself finds the model without, and speaks of methods that nobody has asked for.
        from vllm_del.engine.setup import check_target

        check_target(config)
        if config.use_v2_model_runner:
            import vllm.v1.worker.gpu.model_runner as runner_v2

            wrap(runner_v2, "init_speculator", _make_speculator)
            wrap(runner_v2.GPUModelRunner, "prepare_inputs", keep_to_the_graph)
        else:
            import vllm.v1.sample.rejection_sampler as sampler_v1
            from vllm.v1.spec_decode.draft_model import DraftModelProposer
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner

            wrap(DraftModelProposer, "__new__", _make_proposer)
            wrap(GPUModelRunner, "_prepare_inputs", sample_as_without_drafts)
            wrap(sampler_v1, "expand_batch_to_tokens", expand_for_any_dtype)
    original(self, *args, **kwargs)
    if isinstance(config.speculative_config, DelConfig):
        # vLLM compares method names here too. Of which layers, `DelConfig` says in vLLM's own way.
        runner = self.worker.model_runner
        runner.use_aux_hidden_state_outputs = config.speculative_config.is_dynamic
        if config.use_v2_model_runner:
            runner.speculator.runner = runner
        wrap(type(self.worker), "compile_or_warm_up_model", _prepare_to_serve)
        wrap(type(runner), "execute_model", _hand_over_the_allowance)
        wrap(type(runner), "sample_tokens", _report)


def _prepare_to_serve(original: Callable, self: "WorkerBase", *args: Any, **kwargs: Any) -> Any:
    """[registry] The drafter is told when the model, its KV cache and its graphs are ready.

    Why: what a round costs can only be measured then, and no drafter of vLLM's needs to know it.
    """
    result = original(self, *args, **kwargs)
    if isinstance(self.vllm_config.speculative_config, DelConfig):
        drafter_of(self.model_runner).prepare_to_serve()
    return result


def _hand_over_the_allowance(
    original: Callable, self: Any, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any
) -> Any:
    """[registry] The drafter is told what the scheduler has reserved for drafts.

    Why: a drafter gets one draft length for all. A scheduler of the user's own says nothing, and reserves the largest.
    The runner's, and not the worker's, as some executors call the runner themselves.
    """
    if (allowance := getattr(scheduler_output, "del_allowance", None)) is not None:
        drafter_of(self).allowance = allowance
    return original(self, scheduler_output, *args, **kwargs)


def _report(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """[registry] The scheduler is told how long the next drafts are going to be, so that it places as many, and what
    came of the last ones.

    Why: scheduling asynchronously, vLLM knows one number of drafts for all requests, and its drafters count nothing.
    """
    output = original(self, *args, **kwargs)
    if isinstance(self.vllm_config.speculative_config, DelConfig) and output is not None:
        drafter = drafter_of(self)
        # Each once, also where the next step brings no new one.
        report, drafter.report = drafter.report, None
        getattr(output, "model_runner_output", output).del_report = report
    return output


def _count_for_prometheus(original: Callable, self: "StatLoggerManager", *args: Any, **kwargs: Any) -> None:
    """[registry] Our metrics and our line of the log, beside vLLM's own.

    Why: a logger that is installed as vLLM's plugin is made for everyone, and switches statistics on for them.
    """
    original(self, *args, **kwargs)
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    vllm_config = given["vllm_config"]
    config = vllm_config.speculative_config
    if isinstance(config, DelConfig) and config.is_dynamic:
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        from vllm_del.engine.stat_logger import DelStatLogger

        # One of them counts for Prometheus, or for Ray where that has started vLLM, and so does ours.
        counter = next(it._counter_cls for it in self.stat_loggers if isinstance(it, PrometheusStatLogger))
        ours = DelStatLogger(vllm_config, self.engine_indexes, counter=counter, logs=given.get("client_count", 1) == 1)
        # Before the others: it takes what is ours out of the statistics.
        self.stat_loggers.insert(0, ours)


def drafter_of(runner: Any) -> Any:
    """The `DelSpeculator` or the `DelProposer` of a model runner."""
    return runner.speculator if runner.vllm_config.use_v2_model_runner else runner.drafter


def _make_speculator(original: Callable, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
    """[registry] V2 runner: a DelSpeculator where vLLM would build its draft-model speculator."""
    if not isinstance(vllm_config.speculative_config, DelConfig):
        return original(vllm_config, *args, **kwargs)
    from vllm_del.engine.speculator import DelSpeculator

    given = inspect.signature(original).bind(vllm_config, *args, **kwargs).arguments
    return DelSpeculator(vllm_config, given["device"])


def _make_proposer(original: Callable, cls: type, *args: Any, **kwargs: Any) -> Any:
    """[registry] V1 runner: `DraftModelProposer(...)` yields a DelProposer, its subclass.

    Why `__new__`: the runner tests `isinstance` against the name it calls, so the name has to stay.
    """
    from vllm_del.engine.proposer import DelProposer

    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    return object.__new__(DelProposer if isinstance(vllm_config.speculative_config, DelConfig) else cls)

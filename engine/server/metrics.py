"""Prometheus metrics: what the engine counts, read when somebody asks, and the times that requests take here.

Names are vLLM's where the meaning is the same, so that its dashboards show Triode; `triode:` begins the others. Requests
that reach the engine without this server appear in the engine's own counts only.
"""

import time
from collections.abc import Iterator, Sequence

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from triode.actors.messages import Delta, FinishReason
from triode.engine.completion import Result
from triode.engine.server.served import ServedEngine
from triode.engine.server.tracing import GenerationSpan, Tracing
from triode.engine.statistics import ActorStatistics

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_LAG_PERIOD_S = 0.1
_LABEL = "model_name"


class Metrics:
    """The metrics of one app."""

    def __init__(self, engine: ServedEngine, model_name: str, tracing: Tracing | None = None) -> None:
        self._tracing = tracing
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model_name))

        def histogram(name: str, doc: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, doc, [_LABEL], registry=self._registry, buckets=buckets).labels(model_name)

        def counter(name: str, doc: str) -> Counter:
            return Counter(name, doc, [_LABEL], registry=self._registry).labels(model_name)

        self.first_token_s = histogram("vllm:time_to_first_token_seconds", "From arrival to text.", _FIRST_TOKEN_S)
        self.between_tokens_s = histogram("vllm:inter_token_latency_seconds", "Between tokens.", _TOKEN_S)
        self.per_token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a request's tokens after the first.", _TOKEN_S
        )
        self.request_s = histogram("vllm:e2e_request_latency_seconds", "From arrival to end.", _REQUEST_S)
        self.prompt_sizes = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.output_sizes = histogram("vllm:request_generation_tokens", "Output tokens of a request.", _TOKENS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of accepted requests that ended.")
        self.output_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.sockets = Gauge(
            "vllm:websocket_connections_active", "WebSockets that are open.", [_LABEL], registry=self._registry
        ).labels(model_name)
        self.loop_lag_s = histogram("triode:loop_lag_seconds", "How late the server's event loop is.", _LAG_S)
        self._ends = Counter(
            "vllm:request_success", "Requests ended, by reason.", [_LABEL, "finished_reason"], registry=self._registry
        )
        self._ends_by_reason = {reason: self._ends.labels(model_name, reason.value) for reason in FinishReason}

    def timing(self) -> "Timing":
        """Begin to watch a request that has arrived."""
        return Timing(self, None if self._tracing is None else self._tracing.generation())

    async def watch_lag(self) -> None:
        """Observe how late this event loop is, for as long as it runs. A server does so; an app in another program has no
        loop of its own to watch."""
        while True:
            due_at_s = time.perf_counter() + _LAG_PERIOD_S
            await anyio.sleep(_LAG_PERIOD_S)
            self.loop_lag_s.observe(max(0.0, time.perf_counter() - due_at_s))

    def count_end(self, reason: FinishReason) -> None:
        """A sample ended."""
        self._ends_by_reason[reason].inc()

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class Timing:
    """The times of one request."""

    def __init__(self, metrics: Metrics, span: GenerationSpan | None) -> None:
        self._metrics = metrics
        self._span = span
        self._began_at_s = time.perf_counter()
        self._first_at_s: float | None = None
        self._last_at_s = 0.0
        self._is_closed = False

    def saw(self, deltas: Sequence[Delta]) -> None:
        """Tokens have come."""
        now_s = time.perf_counter()
        num_tokens = sum(len(delta.token_ids) for delta in deltas)
        self._metrics.output_tokens.inc(num_tokens)
        if self._first_at_s is None:
            self._first_at_s = now_s
            self._metrics.first_token_s.observe(now_s - self._began_at_s)
            if self._span is not None:
                self._span.first_token()
        elif num_tokens:
            self._metrics.between_tokens_s.observe((now_s - self._last_at_s) * len(deltas) / num_tokens)
        self._last_at_s = now_s

    def ended(self, result: Result) -> None:
        """The request has its result."""
        self._is_closed = True
        if self._span is not None:
            self._span.end(result)
        metrics, usage = self._metrics, result.usage
        metrics.request_s.observe(time.perf_counter() - self._began_at_s)
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.prompt_sizes.observe(usage.prompt_tokens)
        metrics.output_sizes.observe(usage.completion_tokens)
        longest = max(len(sample.token_ids) for sample in result.completions)
        if self._first_at_s is not None and longest > 1:
            metrics.per_token_s.observe((self._last_at_s - self._first_at_s) / (longest - 1))
        for sample in result.completions:
            metrics.count_end(sample.finish_reason or FinishReason.ERROR)

    def close(self, reason: FinishReason | None = FinishReason.CANCELLED) -> None:
        """The request is over, without a result: its client has left, or it failed, or with None was never accepted."""
        if not self._is_closed:
            self._is_closed = True
            if reason is not None:
                self._metrics.count_end(reason)
            if self._span is not None:
                self._span.end(None)


class _EngineCollector(Collector):
    """Reads the engine's statistics at each scrape."""

    def __init__(self, engine: ServedEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def describe(self) -> Iterator[Metric]:
        """Nothing at registration: the engine is asked at scrapes only."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One sample of everything."""
        statistics = self._engine.statistics()
        scheduler, cache = statistics.scheduler, statistics.cache
        gauge, counter = self._gauge, self._counter
        yield gauge("vllm:num_requests_running", "Sequences in the batch.", scheduler.num_running)
        yield gauge("vllm:num_requests_waiting", "Sequences that wait.", scheduler.num_waiting)
        yield gauge("vllm:kv_cache_usage_perc", "Blocks in use, 0 to 1.", cache.num_used_blocks / cache.num_blocks)
        yield counter("vllm:num_preemptions", "Sequences preempted.", scheduler.num_preemptions)
        yield counter("vllm:prefix_cache_queries", "Tokens looked up.", cache.num_query_tokens)
        yield counter("vllm:prefix_cache_hits", "Tokens found.", cache.num_hit_tokens)
        yield counter("triode:prefix_cache_evicted_blocks", "Cached blocks forgotten.", cache.num_evicted_blocks)
        yield counter("triode:steps", "Steps of the model.", scheduler.num_steps)
        yield gauge("triode:requests_unfinished", "Requests submitted and not ended.", statistics.num_unfinished)
        yield from self._actors(statistics.actors)

    def _gauge(self, name: str, doc: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, doc, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, doc: str, value: float) -> Metric:
        family = CounterMetricFamily(name, doc, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _actors(self, actors: ActorStatistics) -> Iterator[Metric]:
        depth = GaugeMetricFamily("triode:actor_queue_depth", "Messages that wait.", labels=[_LABEL, "actor"])
        busy = CounterMetricFamily("triode:actor_busy_seconds", "Time at work.", labels=[_LABEL, "actor"])
        for name in actors.__struct_fields__:
            inbox = getattr(actors, name)
            depth.add_metric([self._model_name, name], inbox.queue_depth)
            busy.add_metric([self._model_name, name], inbox.busy_s)
        yield depth
        yield busy

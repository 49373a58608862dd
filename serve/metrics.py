"""What an engine counts, under the names that dashboards for such servers already use, prefixed `meshloom:`.

One registry per engine, so that two engines in a process do not add up. Knows nothing of HTTP; `/metrics` renders
`registry`.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)


class EngineMetrics:
    """Counters, gauges and histograms (seconds) of one engine, labelled with the model's name."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"meshloom:{name}", text, ["model_name"], registry=self.registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"meshloom:{name}", text, ["model_name"], registry=self.registry).labels(model_name)

        def seconds(name: str, text: str) -> Histogram:
            name = f"meshloom:{name}_seconds"
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=LATENCY).labels(model_name)

        self.running = gauge("num_requests_running", "Requests that hold cache pages.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for pages or a place in the batch.")
        self.cache_usage = gauge("kv_cache_usage_perc", "Share of KV pages in use; 1 is full.")
        self.preemptions = counter("num_preemptions", "Sequences whose cache was dropped to be recomputed.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.compiles_after_ready = counter(
            "compiles_after_ready", "Programs compiled while serving; above 0 is a defect."
        )
        self.step_failures = counter("step_failures", "Steps that raised; their requests failed.")
        self.time_to_first_token = seconds("time_to_first_token", "Arrival to first token.")
        self.inter_token_latency = seconds("inter_token_latency", "Between two tokens of a stream.")
        self.e2e_latency = seconds("e2e_request_latency", "Arrival to last token.")
        self.queue_time = seconds("request_queue_time", "Arrival to admission.")
        self.prefill_time = seconds("request_prefill_time", "Admission to first token.")
        self.decode_time = seconds("request_decode_time", "First to last token.")
        self._success = Counter(
            "meshloom:request_success", "Finished requests.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._model_name = model_name

    def finished(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

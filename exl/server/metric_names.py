"""Names of ``/metrics``: exl's own, and vLLM's for the same figures (docs.vllm.ai/en/latest/usage/metrics.html).

The second of each three is where the figure comes from: an attribute of ``EngineStats`` or of ``ModelTally``. Counters
get "_total" behind their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Rows = Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Names:
    """``finished``: a name, the label of the reason, what it counts; ``reasons``: other words for the engine's."""

    gauges: Rows
    counters: Rows
    histograms: Rows
    finished: tuple[str, str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)


EXL = Names(
    gauges=(
        ("exl_sequences_running", "running", "Sequences in the batch; a request has one for each choice"),
        ("exl_sequences_waiting", "waiting", "Sequences that have not begun, or were paused"),
        ("exl_cache_pages", "pages_total", "Pages of the KV cache, of 64 tokens"),
        ("exl_cache_pages_free", "pages_free", "Of those, free at once, or kept and given away when needed"),
        ("exl_cache_pages_kept", "pages_kept", "Of the free ones, those whose text is known"),
        ("exl_cache_window_pages", "window_pages_total", "Pages of layers with a window, where they have their own"),
        ("exl_cache_window_pages_free", "window_pages_free", "Of those, free at once, or given away when needed"),
        ("exl_cache_used_ratio", "cache_used", "The share of pages that running sequences hold, of the fuller kind"),
    ),
    counters=(
        ("exl_steps", "steps", "Trips of the scheduler"),
        ("exl_prompt_tokens", "asked", "Tokens of prompts, of requests that have ended"),
        ("exl_prompt_tokens_computed", "prompt_tokens", "Tokens of prompts that were computed"),
        ("exl_generated_tokens", "generated_tokens", "Tokens that were generated"),
        ("exl_preemptions", "preemptions", "Sequences that were paused, since pages had run out"),
        ("exl_recomputed_tokens", "recomputed_tokens", "Tokens computed again after a pause"),
        ("exl_prefix_lookups", "prefix_lookups", "Prompts whose beginning was looked for in the cache"),
        ("exl_prefix_hits", "prefix_hits", "Of those, how many found at least one token"),
        ("exl_prefix_tokens", "prefix_tokens", "Tokens of prompts that were found in the cache"),
        ("exl_draft_tokens", "drafts_tried", "Tokens that were guessed"),
        ("exl_draft_tokens_accepted", "drafts_accepted", "Of those, tokens that were drawn"),
        ("exl_layer_read_bytes", "read_bytes", "Bytes of streamed layers, read from the disk"),
        ("exl_layer_read_wait_seconds", "read_wait_seconds", "Time that steps waited for them"),
    ),
    histograms=(
        ("exl_queue_seconds", "queue", "From the engine's taking a request to its first sequence's beginning"),
        ("exl_time_to_first_token_seconds", "first", "From the request's arrival to its first token"),
        ("exl_inter_token_seconds", "gaps", "Between two tokens of a choice"),
        ("exl_request_seconds", "total", "From the request's arrival to its last token"),
        ("exl_request_prompt_tokens", "prompts", "Tokens of a request's prompt"),
        ("exl_request_generated_tokens", "answers", "Tokens of all choices of a request"),
    ),
    finished=("exl_answers", "finish_reason", "Choices that have ended"),
)

VLLM = Names(
    gauges=(
        ("vllm:num_requests_running", "running", "Number of requests in model execution batches."),
        ("vllm:num_requests_waiting", "waiting", "Number of requests waiting to be processed."),
        ("vllm:kv_cache_usage_perc", "cache_used", "KV-cache usage. 1 means 100 percent usage."),
    ),
    counters=(
        ("vllm:num_preemptions", "preemptions", "Cumulative number of preemption from the engine."),
        ("vllm:prompt_tokens", "asked", "Number of prefill tokens processed."),
        ("vllm:generation_tokens", "generated_tokens", "Number of generation tokens processed."),
        ("vllm:prefix_cache_queries", "asked", "Prefix cache queries, in terms of number of queried tokens."),
        ("vllm:prefix_cache_hits", "cached", "Prefix cache hits, in terms of number of cached tokens."),
        ("vllm:spec_decode_num_draft_tokens", "drafts_tried", "Number of draft tokens."),
        ("vllm:spec_decode_num_accepted_tokens", "drafts_accepted", "Number of accepted tokens."),
    ),
    histograms=(
        ("vllm:time_to_first_token_seconds", "first", "Histogram of time to first token in seconds."),
        ("vllm:inter_token_latency_seconds", "gaps", "Histogram of inter-token latency in seconds."),
        ("vllm:e2e_request_latency_seconds", "total", "Histogram of e2e request latency in seconds."),
        ("vllm:request_queue_time_seconds", "queue", "Histogram of time spent in WAITING phase for request."),
        ("vllm:request_prompt_tokens", "prompts", "Number of prefill tokens processed."),
        ("vllm:request_generation_tokens", "answers", "Number of generation tokens processed."),
    ),
    finished=("vllm:request_success", "finished_reason", "Count of successfully processed requests."),
    reasons={"cancelled": "abort"},
)

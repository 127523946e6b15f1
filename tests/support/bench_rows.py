"""What every row of `triode bench --json` has, in this order."""

KEYS = [
    "test",
    "model",
    "device",
    "dtype",
    "batch",
    "prompt_len",
    "new_tokens",
    "tpot_ms",
    "ttft_ms",
    "out_tok_s",
    "total_tok_s",
    "runs",
    "min",
    "max",
    "versions",
    "read_gb_s",
    "of_reading",
]

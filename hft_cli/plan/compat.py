"""Numbers of DeepSpeed and TRL that the costs depend on. tests/plan/test_compat.py fails when they change."""

# UPSTREAM: deepspeed 0.19.8: defaults of its ZeRO settings, which `train` leaves as they are. In elements.
REDUCE_BUCKET = 500_000_000  # reduce_bucket_size
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # sub_group_size: what ZeRO-3 updates at once
PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller parameters stay whole on each rank

# UPSTREAM: trl 1.16.0: its head computes log-probabilities tile by tile and never holds all logits.
LOGITS_TILE = (4096, 32768)  # tokens, vocabulary

"""The numbers of DeepSpeed and TRL that a plan depends on."""

from __future__ import annotations

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils

from hft_cli.plan import compat


def test_the_defaults_of_zero_are_those_of_deepspeed():
    zero = DeepSpeedZeroConfig()
    assert zero.reduce_bucket_size == compat.REDUCE_BUCKET
    assert zero.max_live_parameters == compat.MAX_LIVE
    assert zero.sub_group_size == compat.SUB_GROUP
    assert zero.param_persistence_threshold == compat.PERSISTENT


def test_the_tile_of_logits_is_that_of_trl():
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == compat.LOGITS_TILE

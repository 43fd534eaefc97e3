"""Names of other trainers lead to keys that exist."""

from __future__ import annotations

from hft_cli.cli.hydra_errors import OTHER_NAMES
from hft_cli.config.help import config_keys
from hft_cli.config.schema import RunConfig


def test_other_names_lead_to_keys_and_are_none():
    keys = config_keys(RunConfig)
    assert set(OTHER_NAMES.values()) <= set(keys)
    assert not OTHER_NAMES.keys() & {key.rpartition(".")[2] for key in keys}

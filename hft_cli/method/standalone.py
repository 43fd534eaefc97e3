"""A draw outside a run, whose settings no config has checked."""

from __future__ import annotations

from collections.abc import Sequence

from hft_cli.checkpoint.naming import Param
from hft_cli.config.schema import SelectionConfig
from hft_cli.config.settings import check_settings
from hft_cli.errors import UserError
from hft_cli.method.selection import Draw, draw


def draw_alone(params: Sequence[Param], config: SelectionConfig, round: int, seed: int) -> Draw:
    """The draw of one round.

    Raises:
        UserError: for a setting that is not allowed, or that the model cannot satisfy.
    """
    for name, value in (("round", round), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{name}={value!r} is not a whole number (int).")
    check_settings(config, "")
    if config.level == "importance":
        raise UserError("level=importance needs rows, which hft train has: hft train +method=importance.")
    if (config.level == "names") != bool(config.names):
        raise UserError(f"level={config.level} with names={config.names}: give both level=names and names, or none.")
    if round < 1 or not 0 <= seed < 2**32:
        raise UserError(f"round={round}, seed={seed}: rounds are counted from 1, and a seed is from 0 to 4294967295.")
    return draw(params, config, round, seed)

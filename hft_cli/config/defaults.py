"""Defaults that depend on what else is chosen: options of the groups data, recipe and suite, and the micro-batch size.

conf/ refers to them as `${default_choice:recipe}` and `${micro_batch_size:4}`. Hydra and OmegaConf understand that in
each process that has called `register`, which includes those in which a parallel launcher composes its jobs.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from hft_cli.config.compat import use_in_defaults_lists

EMBEDDED = "pocket"  # option of group `model`
DATA = {"dpo": "pocket_preferences", "hft_dpo": "pocket_preferences"}  # method -> embedded data
RECIPES = {"trace": "trace", "pocket_larger": "pocket_long", "pocket_order": "pocket_long"}  # data -> recipe


def default_choice(group: str, *, _root_: Any) -> str:
    """The option of `group` that goes with the options of other groups.

    Args:
        group: data, recipe or suite.
        _root_: the options that are known so far, by group. A group whose default is still open is missing.
    """
    embedded = _root_.get("model") == EMBEDDED
    data = DATA.get(_root_.get("method"), "pocket_capitals") if embedded else "none"
    data = str(_root_.get("data", data))
    if group == "data":
        return data
    embedded_data = data.startswith("pocket_")
    if group == "suite":
        return "pocket" if embedded_data else "none"
    if embedded_data:
        return RECIPES.get(data, "pocket") if embedded else "tulu2"
    return RECIPES.get(data, "tulu2")


def micro_batch_size(most: int, *, _root_: Any) -> int:
    """The largest number of rows up to `most` that divides what a rank has of train.batch_size.

    Args:
        most: rows; returned as it is if train.batch_size is not a multiple of the number of ranks.
        _root_: the composed config.
    """
    ranks = max(_root_.engine.num_processes * _root_.engine.num_nodes, 1)
    rows, rest = divmod(_root_.train.batch_size, ranks)
    return most if rest else next(size for size in range(most, 0, -1) if rows % size == 0)


def register() -> None:
    """Make the functions above known to OmegaConf and Hydra."""
    use_in_defaults_lists(default_choice.__name__, default_choice)
    OmegaConf.register_new_resolver(micro_batch_size.__name__, micro_batch_size, replace=True)

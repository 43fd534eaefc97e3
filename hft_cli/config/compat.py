"""What this package relies on in Hydra without documentation."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import OmegaConf


def use_in_defaults_lists(name: str, choose_option: Callable[..., str]) -> None:
    """Let a defaults list say `- GROUP: ${NAME:ARGUMENT}`.

    `choose_option(ARGUMENT, _root_=options)` returns an option of the group. `options` maps each group to its option.
    Groups whose own option is such an interpolation are missing from it.

    UPSTREAM: hydra-core 1.3.8: a defaults list may use a custom resolver, and its `_root_` has the known options. Hydra
    documents only interpolation by group names. It can go when Hydra has conditional defaults.
    """
    OmegaConf.register_new_resolver(name, choose_option, replace=True)

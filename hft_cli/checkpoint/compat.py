"""Uses of private and undocumented parts of transformers. tests/checkpoint/test_compat.py fails when they change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.naming import BUFFERS

if TYPE_CHECKING:
    from torch import Tensor


class NameMapping:
    """Maps tensors of checkpoint files to entries of a model's state dict, as `from_pretrained` does, by name alone.

    UPSTREAM: transformers 5.23.0: the loader renames tensors and merges experts by tables in `conversion_mapping` and
    `core_model_loading` that have no public reader, and keeps ignored and tied names in attributes of the model. Can go
    when transformers tells which file tensors make a parameter.

    Attributes:
        tied: name of a tied entry of the state dict -> name of the parameter that it is tied to.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *BUFFERS]
        self.tied: Mapping[str, str] = model.all_tied_weights_keys

    def target(self, tensor: str) -> tuple[str, bool]:
        """The entry of the state dict that a file tensor goes into, and whether it is split over several entries."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(tensor, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state and tensor in self._state:  # the loader falls back to the plain name
            return tensor, False
        splitting = (entry for entry in self._converters if len(entry.target_patterns) > 1)
        return target, any(pattern in entry.source_patterns for entry in splitting)

    def is_ignored(self, target: str) -> bool:
        """Whether the loader accepts a tensor of this name without using it as a parameter: a buffer or a constant."""
        return target in self._state or any(re.search(pattern, target) for pattern in self._ignored)


def file_tensors(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the module under the names and in the shapes that `save_pretrained` writes; memory may be shared.

    UPSTREAM: transformers 5.23.0: `save_pretrained` writes whole models only, and `revert_weight_conversion` is not
    documented. Can go when transformers converts single tensors.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))

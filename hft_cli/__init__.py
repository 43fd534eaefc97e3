"""hft: fine-tune language models without making them forget (Half Fine-Tuning, ACL 2025).

For trainers of one's own: `half_finetune`, `next_round`, `HalfFinetuneCallback` and `verify`. They are imported when
they are used, so that `import hft_cli` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hft_cli.integrations.half import half_finetune
    from hft_cli.integrations.trainer import HalfFinetuneCallback, next_round
    from hft_cli.runner.model_proof import verify

__all__ = ["HalfFinetuneCallback", "half_finetune", "next_round", "verify"]

_MODULES = {
    "half_finetune": "hft_cli.integrations.half",
    "HalfFinetuneCallback": "hft_cli.integrations.trainer",
    "next_round": "hft_cli.integrations.trainer",
    "verify": "hft_cli.runner.model_proof",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

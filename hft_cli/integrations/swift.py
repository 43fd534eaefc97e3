"""A plugin of ms-swift: `swift sft --tuner_type full --external_plugins FILE --callbacks hft`, where FILE is this file.

`python -c "import hft_cli.integrations as i; print(i.__path__[0] + '/swift.py')"` prints where it is. Settings are read
from the environment, with the defaults of `half_finetune`: HFT_RATIO, HFT_SEED, HFT_ROUND, HFT_LEVEL, HFT_EMBEDDINGS,
HFT_HEAD. Needs ms-swift.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map

from hft_cli.integrations.half import half_finetune
from hft_cli.integrations.trainer import HalfFinetuneCallback

SETTINGS: dict[str, Callable[[str], Any]] = {
    "ratio": float, "seed": int, "round": int, "level": str, "embeddings": str, "head": str,
}  # fmt: skip


class HftCallback(TrainerCallback):  # type: ignore[misc]
    """Draw at the end of the trainer's construction, when it has the model and no optimizer yet."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        given = {name: os.environ.get(f"HFT_{name.upper()}") for name in SETTINGS}
        draw = half_finetune(model, **{name: SETTINGS[name](text) for name, text in given.items() if text})
        self.trainer.add_callback(HalfFinetuneCallback(draw))


callbacks_map["hft"] = HftCallback

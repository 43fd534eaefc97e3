"""A plugin of axolotl: `plugins: [hft_cli.integrations.axolotl.HftPlugin]` in its YAML. Needs axolotl.

Settings there, with the defaults of `half_finetune`: hft_ratio, hft_seed, hft_round, hft_level, hft_embeddings,
hft_head.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from hft_cli.integrations.half import half_finetune
from hft_cli.integrations.trainer import HalfFinetuneCallback
from hft_cli.method.selection import Draw


class HftArgs(BaseModel):
    """The keys that the plugin adds to axolotl's YAML."""

    hft_ratio: float | None = None
    hft_seed: int | None = None
    hft_round: int | None = None
    hft_level: str | None = None
    hft_embeddings: str | None = None
    hft_head: str | None = None


class HftPlugin(BasePlugin):  # type: ignore[misc]
    """Draw when the model is loaded, and give the trainer `HalfFinetuneCallback`."""

    draw: Draw | None = None

    def get_input_args(self) -> str:
        return f"{HftArgs.__module__}.{HftArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        given = {name: cfg.get(name) for name in HftArgs.model_fields}
        settings = {name.removeprefix("hft_"): value for name, value in given.items() if value is not None}
        self.draw = half_finetune(model, **settings)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[HalfFinetuneCallback]:
        return [HalfFinetuneCallback(self.draw)] if self.draw else []

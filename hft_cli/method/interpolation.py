"""How much of its change each parameter keeps when a tuned model goes back to its base, wholly or in part. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hft_cli.checkpoint.naming import Param
from hft_cli.config.schema import MethodConfig


def kept_changes(params: Sequence[Param], names: Iterable[str], method: MethodConfig) -> dict[str, float]:
    """The share of its change that each named parameter keeps: 0 is the base, 1 the tuned model.

    A Half-Reset keeps nothing. An interpolation keeps `alpha` everywhere (WiSE-FT, Wortsman et al. 2022, arXiv
    2109.01903), or `alpha` in the first layer and `alpha_last` in the last, on a line between them (LiNeS, Wang et al.
    2024, arXiv 2410.17146). Embeddings go with the first layer, head and final norm with the last.
    """
    first = method.alpha or 0.0
    last = first if method.alpha_last is None else method.alpha_last
    layers = {layer: number for number, layer in enumerate(sorted({p.layer for p in params if p.layer is not None}))}
    span = max(len(layers) - 1, 1)
    places = {"embedding": 0.0}  # between the first layer and the last, from 0 to 1
    kept = {}
    for param in params:
        place = places.get(param.kind, 1.0) if param.layer is None else layers[param.layer] / span
        kept[param.name] = (1 - place) * first + place * last
    return {name: kept[name] for name in names}

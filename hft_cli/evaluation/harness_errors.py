"""What lm-evaluation-harness raises, as one line that names the key to set."""

from __future__ import annotations

from hft_cli.errors import UserError, first_line
from hft_cli.launch.jobs import HarnessTask

# Types of errors, of whatever package, that say that the hub cannot be reached or lacks the rows.
_CONNECTION = (
    "ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError",
    "OfflineModeIsEnabled", "HfHubHTTPError", "RepositoryNotFoundError", "DatasetNotFoundError", "GatedRepoError",
)  # fmt: skip


def explain(request: HarnessTask, error: BaseException) -> str:
    """One line on why a benchmark could not be scored.

    Args:
        error: what reading its rows or asking the model raised.
    """
    name, text = request.name, first_line(error)
    if isinstance(error, UserError):
        return text if name in text else f"{name}: {text}"
    key = f"suite.benchmarks.{name}." if request.settings is not None else None
    chain = _chain(error)
    if any(type(one).__name__ == "OutOfMemoryError" for one in chain) or "out of memory" in text.lower():
        return f"{name}: the memory of the GPU does not suffice. Lower suite.batch_size."
    if any(kind.__name__ in _CONNECTION for one in chain for kind in type(one).__mro__):
        return f"{name}: its rows cannot be read from the hub ({text}). Give files: suite.data_dir=…, or leave it out."
    if "must be less than model's maximum sequence length" in text:
        fix = f"Lower {key}max_new_tokens." if key else "Leave it out."
        return f"{name}: the answers leave no room for the prompt ({text}). {fix}"
    if "larger than population" in text or "few-shot" in text.lower() or "fewshot" in text.lower():
        fix = f"Lower {key}shots." if key else "Leave it out."
        return f"{name}: there are too few examples for its shots ({text}). {fix}"
    return f"{name}: {type(error).__name__}: {text}"


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those that caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain

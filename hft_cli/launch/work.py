"""Entry point of every worker process: `python -m hft_cli.launch.work KIND JOB.json`, also under torchrun.

KIND is a key of `jobs.WORKERS`. Progress and a user's mistake go into files beside the job file, for the parent
(launch/worker.py).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hft_cli.errors import UserError
from hft_cli.files import write_text
from hft_cli.launch.compat import end_process
from hft_cli.launch.jobs import WORKERS, Progress, read_job
from hft_cli.launch.lifetime import end_with_torchrun, share_lock
from hft_cli.logs import set_up_logging
from hft_cli.run_dir import RoundDir


def main(argv: Sequence[str]) -> int:
    """Do the job of kind argv[0] in the file argv[1], and return the exit status."""
    end_with_torchrun()
    share_lock()
    kind, path = argv[0], Path(argv[1])
    folder = RoundDir(path.parent)
    progress = Progress(folder.progress, rank=int(os.environ.get("RANK", "0")))
    progress.activity("loading torch")
    module, _, function = WORKERS[kind].function.partition(":")
    try:
        load_modules("torch", module)
        getattr(import_module(module), function)(read_job(kind, path), folder, progress)
    except UserError as error:
        write_text(folder.mistake, str(error))
        return 2
    return 0


def load_modules(*names: str) -> None:
    """Import modules without garbage collection: what they load stays, and collections take a fifth of the time."""
    if sys.modules.keys() >= set(names):  # in a fork
        return
    gc.disable()
    for name in names:
        import_module(name)
    gc.freeze()  # later collections skip it, and leave its pages shared between forks
    gc.enable()


if __name__ == "__main__":
    set_up_logging()
    end_process(main(sys.argv[1:]))

"""All benchmarks: start-up, a step, files. Prints a table, and writes it as JSON with the machine.

    python scripts/bench/run.py --out bench.json

It takes 15 minutes on 2 cores. The parts can be run alone, at other sizes: step.py and files.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import files
import step
from table import Row, machine, markdown

FIRST_RUN = 10.0  # seconds that the first run of the README may take


def first_run(folder: Path, repeats: int) -> Row:
    """Seconds of `hft train +method=hft` on the embedded model, with its scores."""
    times = []
    for number in range(repeats):
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / f"cache-{number}")}  # no scores of earlier runs
        command = [sys.executable, "-m", "hft_cli", "train", "+method=hft", f"output_dir={folder}/first-{number}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        times.append(time.perf_counter() - start)
    return Row("first run: hft train +method=hft", tuple(times), bar=FIRST_RUN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the models of files.py")
    parser.add_argument("--folder", type=Path, help="where models are written; a temporary folder if left out")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        work = Path(folder)
        rows = [first_run(work, arguments.repeats)]
        (work / "step").mkdir()
        rows += step.rows(work / "step", "20m", "float32", repeats=arguments.repeats)
        (work / "files").mkdir()
        rows += files.rows(work / "files", arguments.gigabytes, arguments.repeats)
    print(markdown(rows))
    if arguments.out:
        result = {"machine": machine(), "rows": [row.as_dict() for row in rows]}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

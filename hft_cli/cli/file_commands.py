"""The sub-commands that read the files of runs: verify, gate, show, materialize, publish, report."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from hft_cli.cli.arguments import Parser, path, points, round_number
from hft_cli.cli.show_tokens import show_tokens
from hft_cli.errors import UserError, choose
from hft_cli.paths import expand_home
from hft_cli.text import first_of

if TYPE_CHECKING:
    from hft_cli.runner.verify import RoundProof

logger = logging.getLogger(__name__)


def verify_run(parser: Parser, words: list[str]) -> int:
    """`hft verify`, of a run or of two models: exit status 1 if something is not proven."""
    from tqdm import tqdm

    from hft_cli.cli.model_commands import verify_models
    from hft_cli.run_dir import finished
    from hft_cli.runner.verify import verify

    parser.add_argument("run", metavar="RUN|BASE", help="directory of a finished run, or the model before a training")
    parser.add_argument("tuned", nargs="?", metavar="TUNED", help="the model after it, wherever it was trained")
    parser.add_argument("--draw", type=path, metavar="FILE", help="the draws that TUNED must follow (a draws.json)")
    parser.add_argument("--infer", action="store_true", help="which draw explains what moved between BASE and TUNED")
    parser.add_argument(
        "--base", type=expand_home, metavar="BASE", help="the model that the run started from, if it has moved"
    )
    parser.add_argument("--model", type=path, metavar="FOLDER", help="check this final model instead of RUN/model")
    options = parser.parse(words)
    if options.tuned is not None:
        if options.infer == (options.draw is not None) or options.base or options.model:
            raise UserError("For two models give --draw FILE or --infer: hft verify BASE TUNED --infer.")
    elif options.draw or options.infer:
        raise UserError("--draw and --infer are for two models: hft verify BASE TUNED --infer.")
    silent = not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO)
    bar = tqdm(desc="verify", unit=" tensors", leave=False, disable=silent)
    if options.tuned is not None:
        return verify_models(options.run, options.tuned, options.draw, bar)
    with bar:
        run = finished(path(options.run))
        proofs = verify(run, options.model, options.base, tick=lambda name: bar.update() and None)
    for proof in proofs:
        print(_proof_text(proof))
    failed = any(proof.faults for proof in proofs)
    print("NOT VERIFIED" if failed else f"verified: {len(proofs)} round{'s' * (len(proofs) > 1)}")
    return 1 if failed else 0


def _proof_text(proof: RoundProof) -> str:
    """What was checked of one round, with its faults below."""
    where = "files" if proof.in_memory is None else "files, and in memory after the last step"
    verdict = f"frozen ones bit-identical (in {where})" if proof.frozen else "the model is the base with the deltas"
    verdict = "FAILED" if proof.faults else verdict
    counts = f"{proof.updated} tensors updated, {proof.frozen} frozen"
    lines = [f"round {proof.round} {proof.name}: {counts}: {verdict}"]
    if proof.unmoved:
        lines.append(f"  updated, but with the same values as before: {first_of(proof.unmoved)}")
    return "\n".join([*lines, *(f"  {fault}" for fault in proof.faults)])


def show(parser: Parser, words: list[str]) -> int:
    """`hft show draws` and `hft show tokens`."""
    from hft_cli.report.draws_table import draws_table
    from hft_cli.run_dir import RunDir

    if words[:1] == ["tokens"]:
        return show_tokens(words[1:])
    parser.add_argument("what", metavar="draws", help="the ledger of draws")
    parser.add_argument("run", type=path, metavar="RUN", help="directory of a run")
    options = parser.parse(words)
    choose("thing to show", options.what, ["draws", "tokens"])
    print(draws_table(RunDir(options.run)))
    return 0


def materialize_model(parser: Parser, words: list[str]) -> int:
    """`hft materialize`, of a run or of a published delta."""
    from hft_cli.run_dir import RunDir
    from hft_cli.runner.deltas import apply, materialize

    parser.add_argument("source", type=path, metavar="RUN|DELTA", help="directory of a run, or a published delta")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="new folder for the model")
    parser.add_argument("--round", type=round_number, metavar="K", help="the model after round K (default: the last)")
    parser.add_argument(
        "--base",
        type=expand_home,
        metavar="BASE",
        help="folder or hub name of the model that the run started from: always for a delta, for a run if it has moved",
    )
    options = parser.parse(words)
    source = options.source
    if not source.exists():
        raise UserError(f"There is no run or delta {source}.")
    if (source / "config.yaml").exists():
        materialize(RunDir(source), options.round, options.out, options.base)
    elif options.round is not None:
        raise UserError(f"{source} is not a run, and a published delta has no rounds: leave out --round.")
    elif options.base is None:
        raise UserError(
            f"{source} is not the directory of a run. If it is a published delta, give its base: --base BASE."
        )
    else:
        apply(source, options.base, options.out)
    print(f"Model: {options.out}")
    return 0


def publish_delta(parser: Parser, words: list[str]) -> int:
    """`hft publish`."""
    from hft_cli.run_dir import RunDir
    from hft_cli.runner.deltas import publish
    from hft_cli.runner.hub import push

    parser.add_argument("run", type=path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="new folder for the delta")
    parser.add_argument("--round", type=round_number, metavar="K", help="changes up to round K (default: the last)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to this model repository on the hub, too")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public, not private")
    options = parser.parse(words)
    if options.public and options.push is None:
        raise UserError("--public is for --push OWNER/NAME.")
    publish(RunDir(options.run), options.round, options.out)
    print(f"Delta with its model card: {options.out}")
    if options.push is not None:
        print(f"Uploaded: {push(options.out, options.push, options.public)}")
    return 0


def gate_run(parser: Parser, words: list[str]) -> int:
    """`hft gate`: exit status 0 if all limits hold, 3 if not, or if the scores cannot tell."""
    from hft_cli.report.gate import checks, gate_text, ships
    from hft_cli.report.reading import read_run
    from hft_cli.run_dir import finished

    parser.add_argument("run", type=path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--max-loss", type=points, metavar="POINTS", help="most that a task of a suite may lose")
    parser.add_argument("--min-gain", type=points, metavar="POINTS", help="least that a test set must gain")
    parser.add_argument("--suite", action="append", default=[], metavar="SUITE", help="suite to check (default: all)")
    options = parser.parse(words)
    if options.max_loss is None and options.min_gain is None:
        raise UserError("Give a limit: --max-loss 2, --min-gain 5, or both.")
    found = checks(read_run(finished(options.run)), options.max_loss, options.min_gain, options.suite)
    print(gate_text(found))
    return 0 if ships(found) else 3


def report_runs(parser: Parser, words: list[str]) -> int:
    """`hft report`."""
    from hft_cli.report.write import report

    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="directories of runs, or folders of such")
    parser.add_argument("--out", type=path, default="report", metavar="FOLDER", help="where to write (default: report)")
    parser.add_argument("--norms", action="store_true", help="measure how far each matrix moved (reads the weights)")
    options = parser.parse(words)
    print(report(options.runs, options.out, options.norms))
    return 0

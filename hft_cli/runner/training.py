"""Walk a run's plan: write the ledger, start a worker for each round, put the model together, score, verify, resume."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.deltas import apply_deltas, write_delta_file
from hft_cli.checkpoint.folders import model_folder
from hft_cli.config.data_sets import test_format
from hft_cli.config.deepspeed import deepspeed_settings
from hft_cli.config.schema import RunConfig
from hft_cli.config.validate import check
from hft_cli.errors import NodeError, Stopped, UserError
from hft_cli.evaluation.metrics import backward_transfer, overall_performance
from hft_cli.evaluation.scorer import ScoredModel, score, scores_of
from hft_cli.evaluation.suite import Suite
from hft_cli.files import flatten, read_json, write_json, write_text
from hft_cli.launch.jobs import PhaseJob, RowsTask
from hft_cli.launch.nodes import LATE, WAIT, Followers, Node, connect, introduce, listen, this_node
from hft_cli.launch.worker import WorkerRun, follow_leader, hold_lock, run_worker
from hft_cli.method.rounds import Phase, phase_config, with_model_limits
from hft_cli.method.selection import Draw
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir, RunDir
from hft_cli.runner.prepare import (
    Prepared,
    clear_folder,
    find_unfinished,
    half_reset_tensors,
    node_facts,
    prepare,
    refuse_other_files,
    same_config,
    same_inputs,
    seal,
)
from hft_cli.runner.tracking import Tracker, require_tracker, track
from hft_cli.runner.verify import verify

logger = logging.getLogger(__name__)


def run(config: RunConfig, overrides: Sequence[str], search: bool = False) -> RunDir | None:
    """Do all that `hft train` was asked for, continuing an unfinished run in the same directory.

    With `search` and resume=true the newest unfinished run of the same configuration beside output_dir is continued.
    Of several nodes, those that follow node 0 return None.

    Raises:
        UserError: for a mistake in the config or the data, before anything is written.
        subprocess.CalledProcessError: if a worker fails; its log is named on stderr.
        NodeError: if another node fails or goes away.
    """
    check(config)
    require_tracker(config.tracking)
    node = this_node(config.engine)
    if node is None:
        return _lead(config, overrides, search, None)
    if search:
        raise UserError(
            f"engine.num_nodes={node.count} needs output_dir=…: one folder, on a file system that all nodes share."
        )
    if node.rank == 0:
        with listen(node) as others:
            return _lead(config, overrides, False, others)
    _join(config, node)
    return None


def _join(config: RunConfig, node: Node) -> None:
    """The part of a node that follows node 0.

    Raises:
        UserError: for a mistake in the config or the data, or on another node.
        NodeError: if node 0 fails, goes away, or does not come.
    """
    base = model_folder(resolve_path(config.model.path))
    config = with_model_limits(config, read_json(base / "config.json"), base.name)
    where = RunDir(Path(config.output_dir).expanduser())
    if where.done.exists():
        same_config(where, config)
        return
    leader = connect(node, LATE)
    try:
        prepared = prepare(config, base, where)
        if leader is None:
            logger.info(f"Waiting for node 0 at {node.host}:{node.port}.")
            leader = connect(node, WAIT)
        if leader is None:
            raise NodeError(f"Node 0 does not answer at {node.host}:{node.port}. Start the same command there too.")
        introduce(leader, node_facts(prepared), where.nodes)
    except BaseException as error:  # whatever it is, the others wait for us
        told: dict[str, Any] = {"failed": repr(error)}
        if isinstance(error, UserError):
            told = {"mistake": str(error)}
        elif isinstance(error, Stopped):
            told = {"stop": error.number}
        leader = leader or connect(node, LATE)
        if leader is not None:
            with suppress(NodeError):
                leader.send(**told)
        raise
    follow_leader(leader, node, where.folder, config.engine.num_processes)


def _lead(config: RunConfig, overrides: Sequence[str], search: bool, others: Followers | None) -> RunDir:
    """The whole run, of several nodes on node 0."""
    base = model_folder(resolve_path(config.model.path))
    config = with_model_limits(config, read_json(base / "config.json"), base.name)
    where = find_unfinished(config) if config.resume and search else RunDir(Path(config.output_dir).expanduser())
    if config.resume and not where.config.exists():
        raise UserError(f"resume=true, but there is no run in {where.folder}.")
    if where.done.exists():
        same_config(where, config)
        logger.info(f"{where.folder} is finished already; nothing to do.")
        return where
    prepared = prepare(config, base, where)
    inputs = prepared.inputs

    new = not where.config.exists()
    if new:
        refuse_other_files(where)
        where.folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(where.lock):
        if new:
            seal(where, config, overrides, prepared.drawn, inputs)
        else:
            same_config(where, config)
            same_inputs(where, inputs)
            logger.info(f"Continuing the run in {where.folder}.")
        try:
            if others is not None:
                logger.info(f"Waiting for {others.node.count - 1} more nodes at {others.node.host}:{others.node.port}.")
                others.meet(node_facts(prepared), where.nodes)
            if settings := deepspeed_settings(config):
                write_json(where.deepspeed, settings)
            with track(config.tracking, where.folder, flatten(asdict(config))) as tracked:
                return _walk(where, prepared, tracked, others)
        except (UserError, NodeError):  # one that only a worker or another node could see
            if new and not where.metrics.exists() and not list(where.folder.glob("rounds/*/outcome.json")):
                clear_folder(where.folder)  # nothing was trained, and the mended command starts anew
            raise


def _walk(where: RunDir, prepared: Prepared, tracked: Tracker, others: Followers | None) -> RunDir:
    """Score, train round by round, score again; what is done already is not done again.

    The suite's benchmarks and probes are scored at the start and at the end only; its sets of rows and the data's own
    test sets after each round of several as well.
    """
    config, base, plan, drawn, asked = (
        getattr(prepared, name) for name in ("config", "base", "phases", "drawn", "asked")
    )
    tests = {
        step.task: RowsTask(step.test, step.metric, test_format(config.data))
        for step in plan
        if step.test is not None and not step.replays
    }
    scored = partial(_score, where, config, others)
    start = ScoredModel(base, config.model, read_json(where.plan)["base_sha256"], shared=True)
    before = scored("before", start, asked, tests)
    tracked.send_scores("before", before, 0)
    model, adapter = base, None
    outcomes, scores, trained = [], [], 0  # optimizer steps so far
    for step, chosen in zip(plan, drawn, strict=True):
        send = partial(tracked.send_metrics, where.metrics, step.name, trained)
        model = _round(where, step, chosen, model, config, adapter, send, others)
        send()
        folder = where.round(step.number, step.name)
        adapter = folder.adapter if config.continual.name == "lora" else None
        outcomes.append(read_json(folder.outcome))
        trained += outcomes[-1].get("steps", 1)  # a Half-Reset counts as one
        if plan[-1].round > 1 and step.number == max(other.number for other in plan if other.round == step.round):
            seen = {other.task for other in plan if other.round <= step.round}
            due = {task: test for task, test in tests.items() if task in seen or config.continual.score_unseen}
            whole = asked if step.round == plan[-1].round else replace(asked, benchmarks={}, probes={})
            scores.append(scored(f"round-{step.round:02d}", ScoredModel(model, config.model), whole, due))
            tracked.send_scores(f"round-{step.round:02d}", scores[-1], trained)
    if config.method.save_model and not where.model.exists():
        model.rename(where.model)
    if scores:
        after = scores[-1]
    elif config.method.save_model:
        after = scored("after", ScoredModel(where.model, config.model), asked, tests)
    else:
        back = str(model_folder(resolve_path(str(config.model.base))))
        reset = ScoredModel(base, config.model, base=back, reset=drawn[0].updated)
        after = scored("after", reset, asked, tests)
    if not scores:
        tracked.send_scores("after", after, trained)
    continual = {"continual": {"name": config.continual.name, **_measures(plan, scores)}}
    send = partial(tracked.send_results, step=trained)
    return _finish(where, config, plan, drawn, outcomes, {"before": before, "after": after}, continual, send)


def _measures(plan: Sequence[Phase], scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """R with its overall performance and backward transfer, where there are rounds and each has its own test set."""
    rounds = [step for step in plan if not step.replays]
    tasks = [step.task for step in rounds]
    if len(tasks) < 2 or len({step.test for step in rounds} - {None}) < len(tasks):
        return {}
    matrix = [[row["data"].get(step.task, {}).get(step.metric) for step in rounds] for row in scores]
    measures = {"R": matrix, "OP": overall_performance(matrix), "BWT": backward_transfer(matrix)}
    return {"tasks": tasks, "metrics": [step.metric for step in rounds], **measures}


def _round(
    where: RunDir,
    step: Phase,
    chosen: Draw,
    model: Path,
    config: RunConfig,
    adapter: Path | None,
    send: Callable[[], None],
    others: Followers | None,
) -> Path:
    """Train one round from the model at `model`, unless it is done, and return the folder of the model after it.

    While it trains, `send` is called a few times a second.
    LoRA goes on from the adapters of the round before, beside the base: merged into it, they are the model at `model`.
    """
    start = model_folder(resolve_path(config.model.path)) if adapter else model
    base_sha256 = read_json(where.plan)["base_sha256"]
    folder = where.round(step.number, step.name)
    out = where.model if where.model.exists() else folder.model
    if not folder.outcome.exists() and step.stage == "half_reset":
        folder.folder.mkdir(parents=True, exist_ok=True)
        logger.info(f"Half-Reset: {_size(chosen)} put back to {step.data}")
        begun = time.perf_counter()
        if config.method.save_model:
            write_delta_file(
                half_reset_tensors(step, chosen, model, config), folder.delta, {"base_sha256": base_sha256}
            )
        write_json(folder.outcome, {"train_seconds": round(time.perf_counter() - begun, 3)})
    if not config.method.save_model:
        return model
    if not folder.outcome.exists():
        folder.folder.mkdir(parents=True, exist_ok=True)
        job = PhaseJob(
            config=phase_config(config, step),
            phase=step,
            model=str(start),
            metrics=str(where.metrics),
            updated=chosen.updated,
            frozen=chosen.frozen,
            adapter=str(adapter) if adapter else None,
            base_sha256=base_sha256,
            deepspeed=deepspeed_settings(config),
        )
        logger.info(f"Round {step.round}, {step.name}: {_size(chosen)} updated")
        ranks = None if config.engine.zero_stage is None else config.engine.num_processes
        label = f"Round {step.round}, {step.name}"
        run_worker(WorkerRun(job, folder, label, ranks, checkpoints=True), send, others)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    shutil.rmtree(folder.tokens, ignore_errors=True)
    if not out.exists():
        own = config.model.chat_template is None
        extra = {folder.template.name: folder.template.read_text()} if folder.template.exists() and not own else {}
        apply_deltas(start, [folder.delta], out, extra)
    if model.is_relative_to(where.folder) and model != out:
        shutil.rmtree(model, ignore_errors=True)  # the last round's model has served
    return out


def _size(chosen: Draw) -> str:
    tensors = f"{len(chosen.updated)} of {len(chosen.updated) + len(chosen.frozen)} tensors"
    return f"{chosen.level}, {tensors}, {chosen.updated_fraction:.1%} of the elements,"


def _score(
    where: RunDir,
    config: RunConfig,
    others: Followers | None,
    when: str,
    model: ScoredModel,
    asked: Suite,
    tests: dict[str, RowsTask],
) -> dict[str, Any]:
    """Scores of one model over the suite and the data's test sets, kept in eval/WHEN; empty if none were asked."""
    folder = RoundDir(where.folder / "eval" / when)
    ranks = config.engine.num_processes
    files = score(
        asked,
        model,
        folder,
        tests=tests,
        generation=config.generation,
        seed=config.seed,
        ranks=ranks,
        meanwhile=others.check if others else lambda: None,
    )
    scores = scores_of(files)
    if files:
        write_json(folder.folder / "scores.json", scores)
    return scores


def _finish(
    where: RunDir,
    config: RunConfig,
    plan: Sequence[Phase],
    drawn: Sequence[Draw],
    outcomes: Sequence[dict[str, Any]],
    scores: dict[str, Any],
    continual: dict[str, Any],
    send: Callable[[dict[str, Any]], None],
) -> RunDir:
    proofs = verify(where) if config.method.save_model else ()
    faults = [f"round {p.round} {p.name}: {fault}" for p in proofs for fault in p.faults]
    engines = dict.fromkeys(engine["name"] for outcome in outcomes for engine in outcome.get("engines", []))
    write_json(
        where.results,
        {
            "method": config.method.name,
            "stage": plan[0].stage,
            "model": config.model.name,
            "data": config.data.name,
            "engine": ", ".join(engines) or config.engine.name,
            "selection": asdict(config.selection),
            "ratio": drawn[0].matrices_reached,
            "seed": config.seed,
            "learning_rate": None
            if plan[0].stage == "half_reset"
            else phase_config(config, plan[0]).train.learning_rate,
            "rounds": [
                {
                    "name": step.name,
                    "round": step.round,
                    "updated_fraction": chosen.updated_fraction,
                    **({"frozen_bit_identical": proof.frozen_bit_identical, "unmoved": proof.unmoved} if proof else {}),
                    **outcome,
                    **{key: planned[key] for key in ("rows_repeated", "rows_in_test") if key in planned},
                }
                for step, chosen, proof, outcome, planned in zip(
                    plan, drawn, proofs or [None], outcomes, read_json(where.plan)["rounds"], strict=True
                )
            ],
            "eval": scores,
            **continual,
            "verification": {"passed": not faults if proofs else None, "faults": faults},
        },
    )
    send(read_json(where.results))
    if faults:
        raise RuntimeError(f"The run does not verify: {faults[0]}. See `hft verify {where.folder}`.")
    write_text(where.done, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
    return where

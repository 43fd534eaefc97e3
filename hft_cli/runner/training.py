"""`hft train`: a run from its start, or from where it was stopped, to its verified end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from hft_cli.checkpoint.folders import known_weights_hash, model_folder
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.data_sets import test_format
from hft_cli.config.schema import RunConfig
from hft_cli.config.validate import check
from hft_cli.errors import NodeError, Stopped, UserError
from hft_cli.evaluation.scorer import HeldOutSets, ScoredModel, WorkerOptions, score, scores_of
from hft_cli.evaluation.suite import Suite
from hft_cli.files import flatten, read_json, write_json, write_text
from hft_cli.launch.jobs import RowsTask
from hft_cli.launch.lifetime import hold_lock
from hft_cli.launch.nodes import Node, this_node
from hft_cli.launch.peer import Peer
from hft_cli.launch.rendezvous import LATE, START_TIMEOUT, Followers, connect, introduce, listen
from hft_cli.launch.worker import follow_leader, load_libraries
from hft_cli.method.interpolation import kept_changes
from hft_cli.method.rounds import Phase
from hft_cli.paths import expanded, resolve_path
from hft_cli.run_dir import RoundDir, RunDir
from hft_cli.runner.directory import (
    clear_folder,
    continue_run,
    find_unfinished,
    refuse_other_files,
    remove_parts,
    require_same_config,
    seal,
)
from hft_cli.runner.phase import Position, Session, run_phase
from hft_cli.runner.prepare import Prepared, fetch_model, node_facts, prepare, with_date
from hft_cli.runner.results import Scores, results
from hft_cli.runner.tracking import require_tracker, track
from hft_cli.runner.verify import verify

logger = logging.getLogger(__name__)


def run(config: RunConfig, overrides: Sequence[str], search: bool = False) -> RunDir | None:
    """Do what `hft train` is asked for. An unfinished run in the same directory is continued.

    `overrides` is what the user typed. With `search` and resume=true the newest unfinished run of this configuration
    beside output_dir is continued. Returns the finished run, or None on a node that follows node 0.

    Raises:
        UserError: for a mistake in the config or the data, before anything is written.
        subprocess.CalledProcessError: if a worker fails. Its log is named on stderr.
        NodeError: if another node fails or goes away.
        RuntimeError: if the finished run does not verify.
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
        with listen(node, RunDir(expanded(config.output_dir)).nodes) as followers:
            return _lead(config, overrides, False, followers)
    _follow(config, node)
    return None


def _lead(config: RunConfig, overrides: Sequence[str], search: bool, followers: Followers | None) -> RunDir:
    """Do the whole run; of several nodes, on node 0."""
    run = RunDir(expanded(config.output_dir))
    config, base = fetch_model(config, run)
    if config.resume and search:
        run = find_unfinished(config)
    elif config.resume and not run.config.exists():
        raise UserError(f"resume=true, but there is no run in {run.folder}.")
    config = with_date(config, base, run)
    if run.done.exists():
        require_same_config(run, config)
        logger.info(f"{run.folder} is finished already; nothing to do.")
        return run
    prepared = prepare(config, base, run)
    new = not run.config.exists()
    if new:
        refuse_other_files(run)
        run.folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(run.lock):
        remove_parts(run)
        if new:
            seal(run, prepared, overrides)
        else:
            continue_run(run, prepared)
        if followers is None and prepared.phases[0].trains:
            load_libraries(config.engine.zero_stage is not None)
        try:
            return _walk_with_nodes(run, prepared, followers)
        except (UserError, NodeError):  # a mistake that only a worker or another node could see
            if new and not run.metrics.exists() and not list(run.folder.glob("rounds/*/outcome.json")):
                clear_folder(run.folder)  # nothing was trained: the corrected command starts anew
            raise


def _walk_with_nodes(run: RunDir, prepared: Prepared, followers: Followers | None) -> RunDir:
    """Wait for the other nodes, open the tracker, and walk through the run."""
    if followers is not None:
        node = followers.node
        logger.info(f"Waiting for {node.count - 1} more nodes at {node.host}:{node.port}.")
        followers.meet(node_facts(prepared))
    if prepared.deepspeed:
        write_json(run.deepspeed, prepared.deepspeed)
    with track(prepared.config.tracking, run.folder, flatten(asdict(prepared.config))) as tracker:
        return _walk(Session(run, prepared, tracker, followers))


def _follow(config: RunConfig, node: Node) -> None:
    """The part of a node that follows node 0. An error here is told to node 0, and one of another node is raised."""
    run = RunDir(expanded(config.output_dir))
    leader: Peer | None = None
    try:
        config, base = fetch_model(config, run)
        config = with_date(config, base, run)
        if run.done.exists():
            require_same_config(run, config)
            return
        leader = connect(node, run.nodes, LATE)
        prepared = prepare(config, base, run)
        if leader is None:
            logger.info(f"Waiting for node 0 at {node.host}:{node.port}.")
            leader = connect(node, run.nodes, START_TIMEOUT)
        if leader is None:
            raise NodeError(f"Node 0 does not answer at {node.host}:{node.port}. Start the same command there too.")
        leader = introduce(leader, node, node_facts(prepared), run.nodes)
    except BaseException as error:  # any error: the other nodes wait for this one
        leader = leader or connect(node, run.nodes, LATE)
        if leader is not None:
            with suppress(NodeError):
                leader.send(**_failure_message(error))
        raise
    follow_leader(leader, node, run.folder, config.engine.num_processes)


def _failure_message(error: BaseException) -> dict[str, Any]:
    """What a node tells node 0 of an error."""
    if isinstance(error, UserError):
        return {"mistake": str(error)}
    if isinstance(error, Stopped):
        return {"stop": error.number}
    return {"failed": repr(error)}


@dataclass(frozen=True)
class TasksToScore:
    """What a model is scored on: a suite, and test sets of the data by task."""

    suite: Suite
    tests: dict[str, RowsTask]


def _walk(session: Session) -> RunDir:
    """Score the base, run the phases, score their models, and verify the files. What is finished is skipped."""
    run, prepared = session.run, session.prepared
    config, tasks = prepared.config, _all_tasks(prepared)
    base = ScoredModel(prepared.base, config.model, prepared.record["base_sha256"], shared=True)
    before = _score(session, "before", base, tasks, 0)

    position, round_scores = Position(prepared.base), []
    for phase, draw in zip(prepared.phases, prepared.draws, strict=True):
        position = run_phase(session, phase, draw, position)
        if due := tasks_after(phase, prepared):
            model = ScoredModel(position.model, config.model)
            round_scores.append(_score(session, f"round-{phase.round:02d}", model, due, position.steps))

    if config.method.save_model and not run.model.exists():
        position.model.rename(run.model)
    after = round_scores[-1] if round_scores else _score(session, "after", _final(session), tasks, position.steps)
    scores = {"before": before, "after": after}
    if not prepared.phases[0].trains:  # what is put back started from this model
        folder = model_folder(resolve_path(str(config.model.base)), "model.base")
        origin = ScoredModel(folder, config.model, known_weights_hash(folder), shared=True)
        scores["base"] = _score(session, "base", origin, tasks, 0)
    return _finish(session, scores, round_scores, position.steps)


def _all_tasks(prepared: Prepared) -> TasksToScore:
    data = prepared.config.data
    tests = {
        phase.task: RowsTask(phase.test, phase.metric, test_format(data), phase.test_hub, data.special_tokens)
        for phase in prepared.phases
        if phase.test is not None and not phase.replays
    }
    return TasksToScore(prepared.suite, tests)


def tasks_after(phase: Phase, prepared: Prepared) -> TasksToScore | None:
    """What the model after a phase is scored on; None within a set, and if there is one set only.

    After each set these are the suite's sets of rows and the test sets of the tasks so far (with
    continual.score_unseen, of all tasks). The suite's benchmarks and probes follow after the last round.
    """
    plan, tasks = prepared.phases, _all_tasks(prepared)
    last_round, scored_rounds = plan[-1].round, {each.round for each in plan if each.ends_set}
    follows = any(other.round == phase.round and other.number > phase.number for other in plan)
    if len(scored_rounds) == 1 or not phase.ends_set or follows:
        return None
    seen = {other.task for other in plan if other.round <= phase.round}
    unseen = prepared.config.continual.score_unseen
    return TasksToScore(
        tasks.suite if phase.round == last_round else replace(tasks.suite, benchmarks={}, probes={}),
        {task: rows for task, rows in tasks.tests.items() if task in seen or unseen},
    )


def _final(session: Session) -> ScoredModel:
    """The model at the end of a run: its folder, or in memory what a run without a model of its own gives."""
    prepared, config = session.prepared, session.prepared.config
    if config.method.save_model:
        return ScoredModel(session.run.model, config.model)
    source = str(model_folder(resolve_path(str(config.model.base))))
    params = parameters_from_folder(prepared.base, config.model.kinds, config.model.part)
    kept = kept_changes(params, prepared.draws[0].updated, config.method)
    return ScoredModel(prepared.base, config.model, base=source, kept=kept)


def _score(session: Session, when: str, model: ScoredModel, tasks: TasksToScore, steps: int) -> Scores:
    """Score a model and send the scores to the tracker at `steps`. They are kept in eval/WHEN; empty without tasks."""
    config, followers = session.prepared.config, session.followers
    folder = RoundDir(session.run.folder / "eval" / when)
    files = score(
        tasks.suite,
        model,
        folder,
        HeldOutSets(tasks.tests, config.generation, config.seed),
        workers=WorkerOptions(config.engine.num_processes, followers.check if followers else lambda: None),
    )
    scores = scores_of(files)
    if files:
        write_json(folder.folder / "scores.json", scores)
    session.tracker.send_scores(when, scores, steps)
    return scores


def _finish(session: Session, before_after: dict[str, Scores], round_scores: Sequence[Scores], steps: int) -> RunDir:
    """Verify the files, write results.json, and last DONE."""
    run, prepared = session.run, session.prepared
    outcomes = [read_json(run.round(phase.number, phase.name).outcome) for phase in prepared.phases]
    proofs = verify(run, base=prepared.base, hash_of=known_weights_hash) if prepared.config.method.save_model else ()
    content = results(prepared, outcomes, proofs, before_after, round_scores)
    write_json(run.results, content)
    session.tracker.send_results(read_json(run.results), steps)
    if faults := content["verification"]["faults"]:
        raise RuntimeError(f"The run does not verify: {faults[0]}. See `hft verify {run.folder}`.")
    write_text(run.done, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
    return run

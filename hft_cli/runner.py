"""Walk a run's plan: write the ledger, start a worker for each round, put the model together, score, verify, resume."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hft_cli.continual import backward_transfer, overall_performance, read_sources
from hft_cli.data import content_hash, read_chats, repeats
from hft_cli.engines import deepspeed_settings
from hft_cli.known import environment
from hft_cli.layout import from_folder
from hft_cli.methods import Step, draws, settled, step_config, steps
from hft_cli.nodes import LATE, WAIT, Node, NodeError, Others, connected, introduce, listening, this_node
from hft_cli.plan import plan as make_plan
from hft_cli.preferences import preferences_hash, read_preferences
from hft_cli.preflight import preflight
from hft_cli.run_dir import RoundDir, RunDir, SealedStep, Task, read_config, read_json, write_json, write_text
from hft_cli.schema import (
    EngineConfig,
    PlanConfig,
    RunConfig,
    Stopped,
    TrackingConfig,
    UserError,
    check,
    locate,
    test_format,
)
from hft_cli.scoring import Asked, Scored, read_suite, score, scores_of, uses_template
from hft_cli.selection import Draw
from hft_cli.tracking import Tracked, require, track
from hft_cli.verify import verify
from hft_cli.weights import Place, fetch, lay_over, reset_pieces, weights_hash, write_pieces
from hft_cli.workers import alone, follow, say, work

# Keys that may differ between a run's nodes.
FREE = (
    "output_dir",
    "resume",
    "engine.node_rank",
    "engine.rendezvous",
    "engine.check_memory",
    *(f"tracking.{spec.name}" for spec in fields(TrackingConfig)),
)
# Keys that may differ when a run is continued; where the engine may not, within a round, the worker says why.
RESUMED = (*FREE, "train.micro_batch_size", *(f"engine.{spec.name}" for spec in fields(EngineConfig)))


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
    require(config.tracking)
    node = this_node(config.engine)
    if node is None:
        return _lead(config, overrides, search, None)
    if search:
        raise UserError(
            f"engine.num_nodes={node.count} needs output_dir=…: one folder, on a file system that all nodes share."
        )
    if node.rank == 0:
        with listening(node) as others:
            return _lead(config, overrides, False, others)
    _join(config, node)
    return None


def _join(config: RunConfig, node: Node) -> None:
    """The part of a node that follows node 0.

    Raises:
        UserError: for a mistake in the config or the data, or on another node.
        NodeError: if node 0 fails, goes away, or does not come.
    """
    base = fetch(locate(config.model.path))
    config = settled(config, read_json(base / "config.json"), base.name)
    where = RunDir(Path(config.output_dir).expanduser())
    if where.done.exists():
        _same_config(where, config)
        return
    leader = connected(node, LATE)
    try:
        prepared = _prepare(config, base, where)
        if leader is None:
            say(f"Waiting for node 0 at {node.host}:{node.port}.")
            leader = connected(node, WAIT)
        if leader is None:
            raise NodeError(f"Node 0 does not answer at {node.host}:{node.port}. Start the same command there too.")
        introduce(leader, _facts(prepared), where.nodes)
    except BaseException as error:  # whatever it is, the others wait for us
        told: dict[str, Any] = {"failed": repr(error)}
        if isinstance(error, UserError):
            told = {"mistake": str(error)}
        elif isinstance(error, Stopped):
            told = {"stop": error.number}
        leader = leader or connected(node, LATE)
        if leader is not None:
            with suppress(NodeError):
                leader.send(**told)
        raise
    follow(leader, node, where.folder, config.engine.num_processes)


@dataclass(frozen=True)
class Prepared:
    """All that is known of a run before it starts."""

    config: RunConfig
    base: Path
    plan: tuple[Step, ...]
    drawn: tuple[Draw, ...]
    asked: Asked
    inputs: dict[str, Any]


def _prepare(config: RunConfig, base: Path, where: RunDir) -> Prepared:
    """Read what the run needs besides the model at `base`, and refuse what cannot work; nothing is written.

    Raises:
        UserError: for a mistake in the config or the data, or a machine that cannot do it.
    """
    params = from_folder(base, config.model.kinds)
    plan, drawn = steps(config), draws(config, params)
    if not drawn[0].updated and plan[0].stage != "half_reset":
        raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    if plan[0].stage == "half_reset":
        _reset_pieces(plan[0], drawn[0], base, config)  # whether the two models fit
    asked = read_suite(config.suite)
    uses_template(config.suite, config.model, base)  # or says why it cannot
    rounds = [asdict(step) | {"data": step.data} | _rows(step, config) for step in plan]
    counted = {step.number: row["rows"] for step, row in zip(plan, rounds, strict=True) if "rows" in row}
    local = replace(config, model=replace(config.model, path=str(base)))  # of the hub's name: the folder it is in now
    costs = make_plan(PlanConfig(**vars(local)), counted)
    preflight(config, costs, new=not where.config.exists())
    inputs = {
        "suite_sha256": asked.rows,
        "base": str(base.resolve()),
        "base_sha256": weights_hash(base),
        "rounds": rounds,
        "costs": costs.expected(),
    }
    return Prepared(config, base, plan, drawn, asked, inputs)


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What must be the same on all nodes."""
    here, inputs = environment(), prepared.inputs
    data = {f"the data of {row['name']}": row["data_sha256"] for row in inputs["rounds"]}
    return {
        "versions": {"hft": here["hft"], "python": here["python"], **here["packages"]},
        "config": {key: value for key, value in _flat(asdict(prepared.config)).items() if key not in FREE}
        | {"the model's folder": str(prepared.base)},
        "files": {"weights": inputs["base_sha256"], **data},
    }


def _lead(config: RunConfig, overrides: Sequence[str], search: bool, others: Others | None) -> RunDir:
    """The whole run, of several nodes on node 0."""
    base = fetch(locate(config.model.path))
    config = settled(config, read_json(base / "config.json"), base.name)
    where = _find(config) if config.resume and search else RunDir(Path(config.output_dir).expanduser())
    if config.resume and not where.config.exists():
        raise UserError(f"resume=true, but there is no run in {where.folder}.")
    if where.done.exists():
        _same_config(where, config)
        say(f"{where.folder} is finished already; nothing to do.")
        return where
    prepared = _prepare(config, base, where)
    inputs = prepared.inputs

    new = not where.config.exists()
    if new:
        _refuse_other_files(where)
        where.folder.mkdir(parents=True, exist_ok=True)
    with alone(where.lock):
        if new:
            _seal(where, config, overrides, prepared.drawn, inputs)
        else:
            _same_config(where, config)
            _same_inputs(where, inputs)
            say(f"Continuing the run in {where.folder}.")
        try:
            if others is not None:
                say(f"Waiting for {others.node.count - 1} more nodes at {others.node.host}:{others.node.port}.")
                others.meet(_facts(prepared), where.nodes)
            if settings := deepspeed_settings(config):
                write_json(where.deepspeed, settings)
            with track(config.tracking, where.folder, _flat(asdict(config))) as tracked:
                return _walk(where, prepared, tracked, others)
        except (UserError, NodeError):  # one that only a worker or another node could see
            if new and not where.metrics.exists() and not list(where.folder.glob("rounds/*/outcome.json")):
                _clear(where.folder)  # nothing was trained, and the mended command starts anew
            raise


def _clear(folder: Path) -> None:
    """Empty a directory, and remove it if it is not a link or a place that we stand in."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not folder.is_symlink() and folder.resolve() != Path.cwd():
        folder.rmdir()


def _walk(where: RunDir, prepared: Prepared, tracked: Tracked, others: Others | None) -> RunDir:
    """Score, train round by round, score again; what is done already is not done again.

    The suite's benchmarks and probes are scored at the start and at the end only; its sets of rows and the data's own
    test sets after each round of several as well.
    """
    config, base, plan, drawn, asked = (
        getattr(prepared, name) for name in ("config", "base", "plan", "drawn", "asked")
    )
    tests = {
        step.task: Task(step.test, step.metric, test_format(config.data))
        for step in plan
        if step.test is not None and not step.replays
    }
    scored = partial(_score, where, config, others)
    start = Scored(base, config.model, read_json(where.plan)["base_sha256"], shared=True)
    before = scored("before", start, asked, tests)
    tracked.scores("before", before, 0)
    model, adapter = base, None
    outcomes, scores, trained = [], [], 0  # optimizer steps so far
    for step, chosen in zip(plan, drawn, strict=True):
        send = partial(tracked.lines, where.metrics, step.name, trained)
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
            scores.append(scored(f"round-{step.round:02d}", Scored(model, config.model), whole, due))
            tracked.scores(f"round-{step.round:02d}", scores[-1], trained)
    if config.method.save_model and not where.model.exists():
        model.rename(where.model)
    if scores:
        after = scores[-1]
    elif config.method.save_model:
        after = scored("after", Scored(where.model, config.model), asked, tests)
    else:
        back = str(fetch(locate(str(config.model.base))))
        reset = Scored(base, config.model, base=back, reset=drawn[0].updated)
        after = scored("after", reset, asked, tests)
    if not scores:
        tracked.scores("after", after, trained)
    continual = {"continual": {"name": config.continual.name, **_measures(plan, scores)}}
    send = partial(tracked.results, step=trained)
    return _finish(where, config, plan, drawn, outcomes, {"before": before, "after": after}, continual, send)


def _measures(plan: Sequence[Step], scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    step: Step,
    chosen: Draw,
    model: Path,
    config: RunConfig,
    adapter: Path | None,
    send: Callable[[], None],
    others: Others | None,
) -> Path:
    """Train one round from the model at `model`, unless it is done, and return the folder of the model after it.

    While it trains, `send` is called a few times a second.
    LoRA goes on from the adapters of the round before, beside the base: merged into it, they are the model at `model`.
    """
    start = fetch(locate(config.model.path)) if adapter else model
    base_sha256 = read_json(where.plan)["base_sha256"]
    folder = where.round(step.number, step.name)
    out = where.model if where.model.exists() else folder.model
    if not folder.outcome.exists() and step.stage == "half_reset":
        folder.folder.mkdir(parents=True, exist_ok=True)
        say(f"Half-Reset: {_size(chosen)} put back to {step.data}")
        begun = time.perf_counter()
        if config.method.save_model:
            write_pieces(_reset_pieces(step, chosen, model, config), folder.delta, {"base_sha256": base_sha256})
        write_json(folder.outcome, {"train_seconds": round(time.perf_counter() - begun, 3)})
    if not config.method.save_model:
        return model
    if not folder.outcome.exists():
        folder.folder.mkdir(parents=True, exist_ok=True)
        SealedStep(
            config=step_config(config, step),
            step=step,
            model=str(start),
            metrics=str(where.metrics),
            updated=chosen.updated,
            frozen=chosen.frozen,
            adapter=str(adapter) if adapter else None,
            base_sha256=base_sha256,
            deepspeed=deepspeed_settings(config),
        ).write(folder.step)
        say(f"Round {step.round}, {step.name}: {_size(chosen)} updated")
        ranks = None if config.engine.zero_stage is None else config.engine.num_processes
        label = f"Round {step.round}, {step.name}"
        work("hft_cli.train", folder.step, folder, label, ranks, send, checkpoints=True, others=others)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    shutil.rmtree(folder.tokens, ignore_errors=True)
    if not out.exists():
        own = config.model.chat_template is None
        extra = {folder.template.name: folder.template.read_text()} if folder.template.exists() and not own else {}
        lay_over(start, [folder.delta], out, extra)
    if model.is_relative_to(where.folder) and model != out:
        shutil.rmtree(model, ignore_errors=True)  # the last round's model has served
    return out


def _reset_pieces(step: Step, chosen: Draw, tuned: Path, config: RunConfig) -> dict[str, list[Place]]:
    folders = (tuned, fetch(locate(step.data), "model.base"))
    own, base = (from_folder(folder, config.model.kinds) for folder in folders)
    return reset_pieces(own, base, folders, chosen.updated, config.method.shared_rows)


def _size(chosen: Draw) -> str:
    tensors = f"{len(chosen.updated)} of {len(chosen.updated) + len(chosen.frozen)} tensors"
    return f"{chosen.level}, {tensors}, {chosen.updated_fraction:.1%} of the elements,"


def _score(
    where: RunDir,
    config: RunConfig,
    others: Others | None,
    when: str,
    model: Scored,
    asked: Asked,
    tests: dict[str, Task],
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
    plan: Sequence[Step],
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
            else step_config(config, plan[0]).train.learning_rate,
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


def _find(config: RunConfig) -> RunDir:
    """The newest unfinished run of the same configuration among those in directories named by date."""
    root = Path(config.output_dir).parent.parent
    found = sorted(root.glob("*/*/plan.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in (RunDir(path.parent) for path in found):
        try:
            if run.config.exists() and not run.done.exists() and not _differences(run, config):
                return run
        except UserError:  # something else's config.yaml
            continue
    raise UserError(f"There is no unfinished run of this configuration in {root}. Give its directory: output_dir=…")


def _refuse_other_files(where: RunDir) -> None:
    if where.folder.exists() and not where.folder.is_dir():
        raise UserError(f"output_dir={where.folder} is a file. Choose an empty or a new directory.")
    ours = {
        where.overrides,
        where.environment,
        where.plan,
        where.draws,
        where.lock,
        where.nodes,
    }  # a start that was cut off
    there = set(where.folder.iterdir()) if where.folder.exists() else set()
    if others := sorted(path.name for path in there - ours if path.suffix != ".part"):
        raise UserError(
            f"output_dir={where.folder} has other files in it ({', '.join(others[:3])}). "
            "Choose an empty or a new directory."
        )


def _seal(
    where: RunDir, config: RunConfig, overrides: Sequence[str], drawn: Sequence[Draw], inputs: dict[str, Any]
) -> None:
    """Write what the run is, config.yaml last: a directory with it has all the rest."""
    write_text(where.overrides, yaml.safe_dump(list(overrides), sort_keys=False))
    write_json(where.environment, environment())
    write_json(where.plan, inputs)
    names = [entry["name"] for entry in inputs["rounds"]]
    entries = [{"name": name, **chosen.as_dict()} for name, chosen in zip(names, drawn, strict=True)]
    write_json(where.draws, {"rounds": entries})
    write_text(where.config, yaml.safe_dump(asdict(config), sort_keys=False))


def _same_config(where: RunDir, config: RunConfig) -> None:
    if different := _differences(where, config):
        raise UserError(
            f"{where.folder} holds a run of another configuration ({'; '.join(different[:3])}"
            f"{' …' if len(different) > 3 else ''}). Use the same configuration, or another output_dir."
        )


def _differences(where: RunDir, config: RunConfig) -> list[str]:
    old, new = _flat(asdict(read_config(where))), _flat(asdict(config))
    keys = sorted((old.keys() | new.keys()) - set(RESUMED))
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _same_inputs(where: RunDir, inputs: dict[str, Any]) -> None:
    sealed = read_json(where.plan)
    if sealed["base_sha256"] != inputs["base_sha256"]:
        raise UserError(
            f"The weights in {inputs['base']} have changed since {where.folder} was begun. "
            "Restore them, or start anew in another output_dir."
        )
    if sealed["suite_sha256"] != inputs["suite_sha256"]:
        raise UserError(
            f"The rows of suite={read_config(where).suite.name} have changed since {where.folder} was begun. "
            "Restore them, or start anew in another output_dir."
        )
    for old, new in zip(sealed["rounds"], inputs["rounds"], strict=True):
        for key, what in (("data_sha256", "data"), ("test_sha256", "test")):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"The {'test ' * (what == 'test')}data of round {old['name']} ({old[what]}) has changed since "
                    f"{where.folder} was begun. Restore it, or start anew in another output_dir."
                )


def _rows(step: Step, config: RunConfig) -> dict[str, Any]:
    """What is known of a step's rows: the hash of what it trains on (or of the weights that a Half-Reset puts back),
    that of its test set, and how many rows are repeated or in the test set too.

    Raises:
        UserError: for a bad row of either.
    """
    data = config.data
    if step.stage == "half_reset":
        known: dict[str, Any] = {"data_sha256": weights_hash(fetch(locate(step.data), "model.base"))}
    elif step.stage == "dpo":
        read = read_preferences(
            locate(step.data), split=step.sources[0].split, max_rows=data.max_rows, ties=config.dpo.ties
        )
        known = {"data_sha256": preferences_hash(read.rows), "rows": len(read.rows)}
    else:
        chats = read_sources(step.sources, data, config.seed)
        known = {"data_sha256": content_hash(chats), "rows": len(chats)}
    if step.test is None:
        return known
    test = read_chats(locate(step.test), format=test_format(data), split="test")
    known["test_sha256"] = content_hash(test)
    if step.stage == "sft" and not step.replays:
        repeated, shared = repeats(chats, test)
        known |= {"rows_repeated": repeated, "rows_in_test": shared}
        if repeated or shared:
            say(
                f"{step.name}: of {known['rows']:,} rows {repeated:,} repeat an earlier one and {shared:,} are in the "
                "test set too."
            )
    return known

"""Walk a run's plan: write the ledger, start a worker for each round, put the model together, score, verify, resume."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from hft_cli.continual import backward_transfer, overall_performance, read_sources
from hft_cli.data import content_hash, read_chats, repeats
from hft_cli.layout import MOST_TOKENS, from_folder, positions
from hft_cli.methods import Step, draws, step_config, steps
from hft_cli.preferences import preferences_hash, read_preferences
from hft_cli.run_dir import Job, RoundDir, RunDir, SealedStep, Task, read_config, read_json, write_json, write_text
from hft_cli.schema import RunConfig, TrackingConfig, UserError, check, locate, test_format
from hft_cli.selection import Draw
from hft_cli.tracking import Tracked, require, track
from hft_cli.verify import verify
from hft_cli.weights import NOT_WEIGHTS, Place, fetch, lay_over, reset_pieces, weights_hash, write_pieces

# Whose packed rows were seen not to see each other (their masks heed where each row's positions begin).
PACKABLE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi3")
# Keys that may differ when a run is continued.
FREE = ("output_dir", "resume", *(f"tracking.{spec.name}" for spec in fields(TrackingConfig)))


def run(config: RunConfig, overrides: Sequence[str], search: bool = False) -> RunDir:
    """Do all that `hft train` was asked for, continuing an unfinished run in the same directory.

    With `search` and resume=true the newest unfinished run of the same configuration beside output_dir is continued.

    Raises:
        UserError: for a mistake in the config or the data, before anything is written.
        subprocess.CalledProcessError: if a worker fails; its log is named on stderr.
    """
    check(config)
    require(config.tracking)
    base = fetch(locate(config.model.path))
    config = _settled(config, base)
    where = _find(config) if config.resume and search else RunDir(Path(config.output_dir).expanduser())
    if config.resume and not where.config.exists():
        raise UserError(f"resume=true, but there is no run in {where.folder}.")
    if where.done.exists():
        _same_config(where, config)
        _say(f"{where.folder} is finished already; nothing to do.")
        return where

    params = from_folder(base, config.model.kinds)
    plan, drawn = steps(config), draws(config, params)
    if not drawn[0].updated and plan[0].stage != "half_reset":
        raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    if plan[0].stage == "half_reset":
        _reset_pieces(plan[0], drawn[0], base, config)  # whether the two models fit
    inputs = {
        "suite_sha256": {
            name: content_hash(read_chats(locate(place), split="test")) for name, place in config.suite.tasks.items()
        },
        "base": str(base.resolve()),
        "base_sha256": weights_hash(base),
        "rounds": [asdict(step) | {"data": step.data} | _rows(step, config) for step in plan],
    }

    new = not where.config.exists()
    if new:
        _refuse_other_files(where)
        where.folder.mkdir(parents=True, exist_ok=True)
    with _lock(where):
        if new:
            _seal(where, config, overrides, drawn, inputs)
        else:
            _same_config(where, config)
            _same_inputs(where, inputs)
            _say(f"Continuing the run in {where.folder}.")
        try:
            with track(config.tracking, where.folder, _flat(asdict(config))) as tracked:
                return _walk(where, config, plan, drawn, base, tracked)
        except UserError:  # one that only a worker could see, such as no answer fitting in train.max_length
            if new and not where.metrics.exists() and not list(where.folder.glob("rounds/*/outcome.json")):
                _clear(where.folder)  # nothing was trained, and the mended command starts anew
            raise


@contextmanager
def _lock(where: RunDir) -> Iterator[None]:
    """Hold the run's directory alone. The workers hold it too, so that one still dying keeps the next from starting."""
    with where.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process works on {where.folder}. Wait for it, or stop it.") from None
        _LOCKS.append(file.fileno())
        try:
            yield
        finally:
            _LOCKS.remove(file.fileno())


_LOCKS: list[int] = []  # descriptors that workers inherit


def _clear(folder: Path) -> None:
    """Empty a directory, and remove it if it is not a link or a place that we stand in."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not folder.is_symlink() and folder.resolve() != Path.cwd():
        folder.rmdir()


def _settled(config: RunConfig, base: Path) -> RunConfig:
    """The config with what hangs on the model filled in.

    Raises:
        UserError: for what the model's own config rules out.
    """
    model: dict[str, Any] = read_json(base / "config.json")
    model = model.get("text_config") or model
    longest = positions(model)
    asked = config.train.max_length
    if longest and asked and asked > longest:
        raise UserError(
            f"train.max_length={asked} is more than the {longest} positions of {base.name}. "
            f"Set train.max_length={longest} or less."
        )
    if config.train.packing and model.get("model_type") not in PACKABLE:
        raise UserError(
            f"train.packing=true is not known to keep rows apart for model type {model.get('model_type')!r}; it is for "
            f"{', '.join(PACKABLE)}. Set train.packing=false."
        )
    answers = config.generation.max_new_tokens
    if longest and answers >= longest - 1 and any(step.test and step.metric != "exact_match" for step in steps(config)):
        raise UserError(
            f"generation.max_new_tokens={answers} leaves no room for a prompt in the {longest} positions of "
            f"{base.name}. Set generation.max_new_tokens={longest // 2} or less."
        )
    return replace(config, train=replace(config.train, max_length=asked or min(longest or MOST_TOKENS, MOST_TOKENS)))


def _walk(
    where: RunDir, config: RunConfig, plan: Sequence[Step], drawn: Sequence[Draw], base: Path, tracked: Tracked
) -> RunDir:
    """Score, train round by round, score again; what is done already is not done again."""
    tests = {
        step.task: Task(step.test, step.metric, test_format(config.data))
        for step in plan
        if step.test is not None and not step.replays
    }
    known = _Known(read_json(where.plan)["base_sha256"], base, config)
    before = _score(where, "before", base, config, tests, known=known)
    tracked.scores("before", before, 0)
    model, adapter = base, None
    outcomes, scores, trained = [], [], 0  # optimizer steps so far
    for step, chosen in zip(plan, drawn, strict=True):
        send = partial(tracked.lines, where.metrics, step.name, trained)
        model = _round(where, step, chosen, model, config, adapter, send)
        send()
        folder = where.round(step.number, step.name)
        adapter = folder.adapter if config.continual.name == "lora" else None
        outcomes.append(read_json(folder.outcome))
        trained += outcomes[-1].get("steps", 1)  # a Half-Reset counts as one
        if plan[-1].round > 1 and step.number == max(other.number for other in plan if other.round == step.round):
            seen = {other.task for other in plan if other.round <= step.round}
            asked = {task: test for task, test in tests.items() if task in seen or config.continual.score_unseen}
            scores.append(_score(where, f"round-{step.round:02d}", model, config, asked))
            tracked.scores(f"round-{step.round:02d}", scores[-1], trained)
    if config.method.save_model and not where.model.exists():
        model.rename(where.model)
    if scores:
        after = scores[-1]
    elif config.method.save_model:
        after = _score(where, "after", where.model, config, tests)
    else:
        after = _score(where, "after", base, config, tests, reset=drawn[0])
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
) -> Path:
    """Train one round from the model at `model`, unless it is done, and return the folder of the model after it.

    While it trains, `send` is called a few times a second.
    LoRA goes on from the adapters of the round before, beside the base: merged into it, they are the model at `model`.
    """
    start = fetch(locate(config.model.path)) if adapter else model
    folder = where.round(step.number, step.name)
    out = where.model if where.model.exists() else folder.model
    if not folder.outcome.exists() and step.stage == "half_reset":
        folder.folder.mkdir(parents=True, exist_ok=True)
        _say(f"Half-Reset: {_size(chosen)} put back to {step.data}")
        begun = time.perf_counter()
        if config.method.save_model:
            write_pieces(_reset_pieces(step, chosen, model, config), folder.delta)
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
        ).write(folder.step)
        _say(f"Round {step.round}, {step.name}: {_size(chosen)} updated")
        label = f"Round {step.round}, {step.name}"
        _work([*_launcher(config), "hft_cli.train", str(folder.step)], folder, label, send)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    shutil.rmtree(folder.tokens, ignore_errors=True)
    if not out.exists():
        own = config.model.chat_template is None
        extra = {folder.template.name: folder.template.read_text()} if folder.template.exists() and not own else {}
        lay_over(start, folder.delta, out, extra)
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


def _launcher(config: RunConfig) -> list[str]:
    if config.engine.zero_stage is None:
        return [sys.executable, "-m"]
    ranks = str(config.engine.num_processes)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, "-m"]


def _work(command: list[str], folder: RoundDir, label: str, send: Callable[[], None] = lambda: None) -> None:
    """Run a worker, its output into the round's log, a progress bar here; when we are stopped, so are all its ranks."""
    folder.mistake.unlink(missing_ok=True)
    folder.progress.unlink(missing_ok=True)
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    ranks = command[command.index("--nproc_per_node") + 1] if "--nproc_per_node" in command else "1"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(ranks))))
    if "--nproc_per_node" not in command:  # with several GPUs in sight, transformers would split each batch over them
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            pass_fds=_LOCKS,
            preexec_fn=_die_with_parent,
        )
        try:
            _follow(process, folder.progress, label, send)
        finally:
            _end(process)
    if process.returncode == 0:
        return
    if folder.mistake.exists():
        raise UserError(folder.mistake.read_text())
    _say(_tail(folder.log))
    _say(f"{label} failed (exit status {process.returncode}). The whole log: {folder.log}")
    raise subprocess.CalledProcessError(process.returncode, command)


def _die_with_parent() -> None:
    """Ask Linux to end the worker if we are killed outright; elsewhere only an orderly stop ends it."""
    if sys.platform == "linux":
        _PRCTL(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


# Looked up ahead: after the fork a thread of ours (a tracker's) may have left the loader's lock held.
_PRCTL: Any = getattr(ctypes.CDLL(None), "prctl", None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a worker's whole process group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            continue


def _follow(process: subprocess.Popen[bytes], progress: Path, label: str, send: Callable[[], None]) -> None:
    """Wait for a worker, showing how far it is; one that keeps no progress file only takes its time."""
    with tqdm(
        desc=label,
        bar_format="{desc} [{elapsed}]",
        mininterval=0.2 if sys.stderr.isatty() else 15,
        total=0,
    ) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            _show(bar, progress, label)
            send()
        _show(bar, progress, label)
        bar.refresh()


def _show(bar: Any, progress: Path, label: str) -> None:
    try:
        at = json.loads(progress.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or in the middle of being written
        return
    if not bar.total:
        bar.reset(total=at["of"])
        bar.bar_format = "{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        bar.initial = at["step"] - 1
        bar.n = bar.initial
    loss = "" if at["loss"] is None else f"loss {at['loss']:.3f}, "
    bar.set_postfix_str(f"{loss}{at['tokens_per_second']:,.0f} tokens/s", refresh=False)
    bar.update(at["step"] - bar.n)


def _score(
    where: RunDir,
    when: str,
    model: Path,
    config: RunConfig,
    tests: dict[str, Task],
    reset: Draw | None = None,
    known: _Known | None = None,
) -> dict[str, Any]:
    """Scores of one model over the suite and the data's test sets, kept in eval/WHEN; empty if none were asked.

    With `reset` the model is scored as Half-Reset would leave it, without writing that. What is `known` of the model
    from other runs is taken from there, and added to.
    """
    tasks: dict[str, dict[str, Task]] = {}
    if config.suite.tasks:
        tasks[config.suite.name] = {name: Task(place) for name, place in config.suite.tasks.items()}
    if tests:
        tasks["data"] = tests
    if not tasks:
        return {}
    folder = RoundDir(where.folder / "eval" / when)
    out = folder.folder / "scores.json"
    if not out.exists():
        folder.folder.mkdir(parents=True, exist_ok=True)
        cells = {folder.score(suite, name): task for suite, own in tasks.items() for name, task in own.items()}
        if known:
            known.take(cells)
        job = folder.folder / "job.json"
        base = str(fetch(locate(str(config.model.base)))) if reset else None
        names = reset.updated if reset else ()
        Job(
            model=config.model,
            path=str(model),
            tasks=tasks,
            batch_size=config.suite.batch_size,
            generation=config.generation,
            seed=config.seed,
            out=str(out),
            base=base,
            reset=names,
        ).write(job)
        if all(cell.exists() for cell in cells):
            write_json(out, {s: {n: read_json(folder.score(s, n)) for n in own} for s, own in tasks.items()})
        else:
            _work([sys.executable, "-m", "hft_cli.evaluate", str(job)], folder, f"Scoring {when}")
        if known:
            known.add(cells)
    scores: dict[str, Any] = read_json(out)
    return scores


class _Known:
    """Scores of a run's start, shared between runs: in the user's cache, under a hash of all that they hang on."""

    def __init__(self, weights: str, base: Path, config: RunConfig) -> None:
        self.folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft" / "scores"
        template = config.model.chat_template
        own = Path(template).expanduser() if template else None
        self.settings: dict[str, Any] = {
            "weights": weights,
            "files": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(base.iterdir())
                if path.suffix in NOT_WEIGHTS
            },
            "template": own.read_text() if own and own.is_file() else template,
            "model": [config.model.dtype, config.model.attention],
            "batch_size": config.suite.batch_size,  # it may tip a tie
            "environment": {key: value for key, value in _environment().items() if key in ("gpus", "packages", "hft")},
        }
        self.config = config

    def _cell(self, task: Task) -> Path:
        settings = dict(self.settings)
        if task.metric != "exact_match":
            settings["generation"] = [asdict(self.config.generation), self.config.seed]
        settings["task"] = [task.metric, content_hash(read_chats(locate(task.path), format=task.format, split="test"))]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key}.json"

    def take(self, cells: dict[Path, Task]) -> None:
        """Copy what is known into the run, the rows first: a cell whose scores are there is whole."""
        taken = 0
        for cell, task in cells.items():
            source = self._cell(task)
            if source.exists() and not cell.exists():
                cell.parent.mkdir(parents=True, exist_ok=True)
                write_text(cell.with_suffix(".jsonl"), source.with_suffix(".jsonl").read_text())
                write_json(cell, read_json(source))
                taken += 1
        if taken:
            _say(f"The start has been scored before: {taken} of {len(cells)} tasks taken from {self.folder}.")

    def add(self, cells: dict[Path, Task]) -> None:
        for cell, task in cells.items():
            target = self._cell(task)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_text(target.with_suffix(".jsonl"), cell.with_suffix(".jsonl").read_text())
                write_json(target, read_json(cell))


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
    write_json(
        where.results,
        {
            "method": config.method.name,
            "stage": plan[0].stage,
            "model": config.model.name,
            "data": config.data.name,
            "engine": config.engine.name,
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
    ours = {where.overrides, where.environment, where.plan, where.draws, where.lock}  # a start that was cut off
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
    write_json(where.environment, _environment())
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
    keys = sorted((old.keys() | new.keys()) - set(FREE))
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
        read = read_preferences(locate(step.data), split=data.split, max_rows=data.max_rows, ties=config.dpo.ties)
        known = {"data_sha256": preferences_hash(read.rows)}
    else:
        chats = read_sources(step.sources, data, config.seed)
        known = {"data_sha256": content_hash(chats), "rows": len(chats)}
    if step.test is None:
        return known
    test = read_chats(locate(step.test), format=test_format(data), split="test")
    known["test_sha256"] = content_hash(test)
    if "rows" in known and not step.replays:
        repeated, shared = repeats(chats, test)
        known |= {"rows_repeated": repeated, "rows_in_test": shared}
        if repeated or shared:
            _say(
                f"{step.name}: of {known['rows']:,} rows {repeated:,} repeat an earlier one and {shared:,} are in the "
                "test set too."
            )
    return known


def _environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can be told without importing torch."""
    packages = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "hydra-core", "omegaconf")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]),
        "packages": {name: metadata.version(name) for name in packages},
        "hft": metadata.version("hft-cli"),
        "git_commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
    }


def _output(command: list[str]) -> list[str]:
    """A command's lines; none if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    return "\n".join(errors[-1:] or lines[-5:])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

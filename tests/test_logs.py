"""Levels of the messages on stderr: -q, -v and HFT_LOG_LEVEL, in one run and in the jobs of a sweep."""

from __future__ import annotations

import logging
import os
import re

import pytest
from helpers import QUICK, hft

from hft_cli.errors import UserError
from hft_cli.logs import VARIABLE, set_up_logging, take_log_flags

RUN = (*QUICK, "+method=hft")


@pytest.fixture(autouse=True)
def separate_logging(monkeypatch):
    """Leave the variable and the logger of this process as they were."""
    monkeypatch.setenv(VARIABLE, "INFO")
    logger = logging.getLogger("hft_cli")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.mark.parametrize(
    "arguments", [["-q", "train", "seed=1"], ["train", "seed=1", "--quiet"], ["train", "-q", "seed=1"]]
)
def test_a_flag_may_stand_anywhere(arguments):
    assert take_log_flags(arguments) == ["train", "seed=1"]
    assert os.environ[VARIABLE] == "WARNING"


def test_without_a_flag_the_variable_decides(capsys):
    for level, shown in (("debug", "debug info warning"), ("INFO", "info warning"), ("ERROR", "")):
        os.environ[VARIABLE] = level
        assert take_log_flags(["train"]) == ["train"]
        set_up_logging()
        for name in ("debug", "info", "warning"):
            getattr(logging.getLogger("hft_cli.some.module"), name)(name)
        assert capsys.readouterr().err.split() == shown.split()


def test_quiet_and_verbose_exclude_each_other():
    with pytest.raises(UserError, match=r"-q .* and -v .* exclude each other"):
        take_log_flags(["-q", "train", "-v"])


def test_an_unknown_level_is_one_line(monkeypatch):
    monkeypatch.setenv(VARIABLE, "warn")
    ended = hft("show", "draws", ".")
    assert ended.status == 2
    assert (
        ended.err
        == "hft: Unknown HFT_LOG_LEVEL 'WARN'. Did you mean 'WARNING'? Available: DEBUG, INFO, WARNING, ERROR.\n"
    )


@pytest.mark.end_to_end
def test_a_quiet_run_prints_its_result_only(tmp_path):
    ended = hft("-q", "train", *RUN, f"output_dir={tmp_path}/run")
    assert (ended.status, ended.err) == (0, "")
    assert "bit-identical" in ended.out


@pytest.mark.end_to_end
def test_jobs_of_a_sweep_log_at_the_level_of_the_command(tmp_path):
    sweep = ("train", "-m", *RUN, "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    verbose = hft(*sweep, "-v", f"output_dir={tmp_path}/verbose")
    assert verbose.status == 0, verbose.err
    assert len(re.findall("Round 1, order: category, ", verbose.err)) == 2
    assert set(re.findall(r"Log: .*verbose/(\S+)/rounds/01-order/worker.log", verbose.err)) == {"seed=1", "seed=2"}
    quiet = hft(*sweep, "-q", f"output_dir={tmp_path}/quiet")
    assert (quiet.status, quiet.err) == (0, "")
    assert "HYDRA" not in quiet.out

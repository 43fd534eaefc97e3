"""`hft eval` on the models of a run."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import yaml

from hft_cli.config.schema import EvalConfig, ModelConfig, RunConfig
from hft_cli.config.suites import SuiteConfig
from hft_cli.errors import UserError
from hft_cli.runner.evaluation import run_eval


def test_a_missing_base_is_not_replaced_by_another_model(tmp_path):
    run = RunConfig(output_dir=str(tmp_path), model=ModelConfig(name="pocket", path="pocket:model"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(run)))
    (tmp_path / "plan.json").write_text('{"base": "/nowhere", "base_sha256": "0"}')
    (tmp_path / "DONE").touch()
    suite = SuiteConfig(name="pocket", tasks={"facts": "pocket:facts.jsonl"})
    config = EvalConfig(run=str(tmp_path), output_dir="", models=["before"], suite=suite)
    config.model, config.engine.name = ModelConfig(name="m", path="m"), "single"
    with pytest.raises(UserError, match="does not exist any more"):
        run_eval(config)

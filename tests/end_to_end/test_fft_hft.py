"""`hft train` with FFT and HFT in one process: what a run leaves, and what it changes."""

from __future__ import annotations

import pytest
import torch
from helpers import BASE, QUICK, changed, hft, ledger, metrics, results, train
from safetensors.torch import load_file

from hft_cli.checkpoint.tensors import read_header


def test_a_run_changes_what_was_drawn_and_nothing_else(hft_run):
    (entry,) = ledger(hft_run)
    assert changed(BASE, hft_run / "model") == set(entry["updated"])
    assert set(read_header(hft_run / "rounds/01-order/delta.safetensors")) == set(entry["updated"])


def test_a_run_directory_holds_the_documented_files(hft_run):
    assert {path.name for path in hft_run.iterdir()} == {
        "config.yaml", "overrides.yaml", "plan.json", "environment.json", "draws.json", "metrics.jsonl", "rounds",
        "model", "results.json", "eval", "DONE", ".lock",
    }  # fmt: skip
    assert not (hft_run / "rounds/01-order/checkpoints").exists()
    assert not (hft_run / "rounds/01-order/model").exists()


def test_results_have_scores_costs_and_the_proof(hft_run):
    found = results(hft_run)
    assert (found["method"], found["stage"], found["seed"]) == ("hft", "sft", 42)
    (entry,) = found["rounds"]
    assert entry["frozen_bit_identical"] is True
    assert entry["steps"] == 4
    assert 0.5 < entry["updated_fraction"] < 0.7
    assert min(entry["train_seconds"], entry["tokens_per_second"], entry["peak_memory_bytes"]) > 0
    assert entry["checkpoint_seconds"] > 0
    assert entry["checkpoint_bytes"] > (BASE / "model.safetensors").stat().st_size  # weights, and moments of half
    assert found["eval"]["before"]["pocket"]["facts"]["exact_match"] >= 0.98
    assert found["eval"]["after"]["pocket"]["facts"]["items"] >= 900


def test_the_log_has_a_line_for_each_step_and_the_loss_falls(hft_run):
    lines = metrics(hft_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["round"] == 1 and line["tokens_per_second"] > 0 for line in lines)


def test_the_model_loads_with_transformers_and_generates(hft_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hft_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(hft_run / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(prompt, max_new_tokens=4).shape[1] > prompt.shape[1]


def test_show_draws_prints_layers_by_matrices(hft_run):
    shown = hft("show", "draws", hft_run).out
    rows = [line.split() for line in shown.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    head = next(line for line in shown.splitlines() if line.startswith("layer")).split()
    attention = [head.index(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert all(sum(row[at] == "●" for at in attention) == 2 for row in rows)


def test_report_makes_a_table_and_a_figure(hft_run, two_rounds, tmp_path):
    ended = hft("report", hft_run, two_rounds, "--out", tmp_path / "out")
    assert ended.status == 0
    assert ended.out.count("| verified |") == 2
    for name in ("runs.md", "runs.csv", "runs.json", "tradeoff.png", "tradeoff.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_rounds_start_from_one_another_and_cover_the_model(two_rounds):
    first, second = ledger(two_rounds)
    assert (first["name"], second["name"]) == ("order", "backwards")
    inside = {name for name in first["updated"] + first["frozen"] if ".layers." in name}
    assert {*first["updated"], *second["updated"]} >= inside  # the draws are complementary
    final = load_file(two_rounds / "model/model.safetensors")
    deltas = [load_file(path) for path in sorted(two_rounds.glob("rounds/*/delta.safetensors"))]
    expected = load_file(BASE / "model.safetensors") | deltas[0] | deltas[1]
    assert all(torch.equal(final[name], expected[name]) for name in final)
    assert [entry["frozen_bit_identical"] for entry in results(two_rounds)["rounds"]] == [True, True]


def test_options_of_training_leave_frozen_float32_weights_alone(tmp_path):
    run = train(
        tmp_path / "run", "+method=hft", "model.dtype=bfloat16", "train.weight_decay=0.5", "train.packing=true",
        "train.gradient_checkpointing=true", "train.schedule=cosine", "selection=model", "selection.balance=elements",
    )  # fmt: skip
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])


@pytest.mark.parametrize("kind", ["tied and sharded", "fused, no prefix", "experts", "gemma2"])
def test_models_with_other_names_in_their_files_train(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

    size = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = {
        "tied and sharded": LlamaConfig(**size, tie_word_embeddings=True),
        "fused, no prefix": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "gemma2": Gemma2Config(**size, head_dim=8),
        "experts": MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2),
    }[kind]
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    run = tmp_path / "run"
    done = hft("train", *QUICK, "+method=hft", "model=local", f"model.path={folder}", f"output_dir={run}", "-v")
    assert done.status == 0, done.err
    assert "Not forked" not in done.err  # also where the command itself has loaded torch
    assert results(run)["verification"] == {"passed": True, "faults": []}
    old, new = (
        {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}
        for path in (folder, run / "model")
    )
    assert old.keys() == new.keys()
    share = sum(old[n].numel() for n in old if not torch.equal(old[n], new[n])) / sum(t.numel() for t in old.values())
    assert 0.3 < share < 0.9
    AutoModelForCausalLM.from_pretrained(run / "model")

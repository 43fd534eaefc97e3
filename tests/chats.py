"""Chats, chat templates and small tokenizers."""

from __future__ import annotations

from functools import cache
from typing import Any

from hft_cli.data.chats import Chat
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import Tokenized
from hft_cli.paths import resolve_path


def chat(*contents: str, system: str = "") -> Chat:
    """user, assistant, user, … after the system's turn, if there is one."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Chat((turn("system", system), *turns) if system else tuple(turns))


def chat_of(*turns: dict[str, Any], **fields: Any) -> Chat:
    return Chat(turns, **fields)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ONE = chat("Why?", "Because.")
TWO = chat("Why?", "Because.", "Why so?", "  It is so.\n", system="Be brief.")
CHATS = [
    ONE,
    TWO,
    chat("Wie?", "Ça va: 你好 🙂"),
    chat("a", "b", "a", "b", "assistant\nb", "a"),
    chat("  q  ", "  two  blanks  "),
]


CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set text = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m.content if loop.first and sys else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BODY = "'<|im_start|>' + m.role + '\n'"
MARKED = (  # the end-of-turn token inside the marks
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ "
    + BODY
    + " }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ " + BODY + " + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
MARKED_BARE = (  # and outside
    "{% for m in messages %}{{ " + BODY + " }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
NEWLINE_ENDS = "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
DROPS_REASONING = (  # as Qwen3's: only the last answer keeps the place for its reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPPED = CHATML.replace("m.content", "m.content | trim")


# template: how an assistant's turn reads in it, as far as it is trained on
TEMPLATES: dict[str, tuple[str, str]] = {
    "tulu": ("tulu", "{}</s>"),
    "plain": ("plain", "{}</s>"),
    "chatml": (CHATML, "{}<|im_end|>"),
    "chatml, marked": (MARKED, "{}<|im_end|>"),
    "chatml, marked without the end of the turn": (MARKED_BARE, "{}<|im_end|>"),
    "llama2": (LLAMA2, " {} </s>"),
    "ends in newlines": (NEWLINE_ENDS, "{}\n"),
}


SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ("bytes", "trimming", "bos", "pieces")
MAT = "the mat " * 50
EVERY = {**{name: template for name, (template, _) in TEMPLATES.items()}, "stripped": STRIPPED}


@cache
def backend(kind: str) -> Any:
    """A byte-level BPE tokenizer which trims blanks off its offsets ("trimming", as Llama 3's) or does not ("bytes"),
    one that puts BOS first ("bos"), or a SentencePiece-like one ("pieces")."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "pieces"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "pieces":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "trimming")
        if kind == "bos":
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256) if kind == "pieces")],
        initial_alphabet=alphabet,
        vocab_size=600,
        show_progress=False,
    )
    text = [turn["content"] for turn in TWO.turns] + ["the cat sat on the mat  and it was so, because it was so\n"] * 9
    text += ["\n\n"] * 9  # one token, as in GPT-2: but at the end of a text only, as a word takes its newline away
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def tokenizer_of(kind: str = "bytes", template: str | None = None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "pocket":
        tokenizer = AutoTokenizer.from_pretrained(resolve_path("pocket:model"))
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(kind), bos_token="<s>", eos_token="</s>")
    if template is not None:
        tokenizer.chat_template = chat_template(template, tokenizer) if template in ("tulu", "plain") else template
    return tokenizer


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != -100]))


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def rendered(tokenizer: Any, chat: Chat, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(chat.turns), tokenize=False, **options))


def ids_of(tokenizer: Any, chat: Chat) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(list(chat.turns))["input_ids"]
    return ids


def history(chat: Chat, turns: int = -1) -> Chat:
    """The first turns of a chat; without a number all but the last."""
    return Chat(chat.turns[:turns])


def counts(tokenized: Tokenized) -> tuple[int, int, int, int]:
    """Rows that are trained on, dropped, truncated and cut."""
    summary = tokenized.summary
    return summary.used, sum(summary.dropped.values()), summary.truncated, summary.cut

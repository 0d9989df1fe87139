"""The tokenizer of ``tiny-llava-digits``: byte-level BPE over the words of the questions."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
# A word, a digit or a sign with the space before it; whatever else there is stays as it comes.
PIECES = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s"
MAX_VOCABULARY = 512
OPENING = "USER: "  # what stands before the image
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT:' }}"
    "{% if message['content'] is string %}"
    "{{ message['content'] if message['role'] == 'user' else ' ' + message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] if message['role'] == 'user' else ' ' + part['text'] }}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def question_tail(text: str) -> str:
    """What stands after the image, up to the answer."""
    return f"\n{text} ASSISTANT:"


def prompt(text: str) -> str:
    """The whole prompt of a question about one picture, as in LLaVA-1.5."""
    return f"{OPENING}<image>{question_tail(text)}"


def corpus() -> list[str]:
    """Text with every word that a question, an answer or the prompt uses."""
    lines = ["USER:", " ASSISTANT:", "USER: What", "\nWhat digit is at row 1 column 2? ASSISTANT:"]
    lines += ["How many 7s are there?", "What is the largest digit?", "Is the 7 left or right of"]
    lines += ["Read row 2.", "Read the digits.", " none", "none", " left", " right"]
    lines += [f" {d}" for d in range(10)]
    return lines * 50


def build() -> PreTrainedTokenizerFast:
    """Train the tokenizer. Any text encodes; each word of the questions is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    trainer = BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast

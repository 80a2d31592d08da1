"""The demo model's tokenizer: a few hundred words, numbers as one token, any text."""

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from word_problems import problems


PAD, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE, trained on the problems, plus one token each for " 0" ... " 99".

    Any text survives a round trip, since every byte is in the vocabulary. The split into words
    must be Qwen2's own: `AutoTokenizer` uses it for every Qwen2 model whatever `tokenizer.json`
    says. It cuts numbers into digits, so the numbers are added tokens, found before the split.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    text = [f"{record['question']}\n{record['solution']}" for record in problems("train", 2000)]
    text += ["user\n", "system\n", "assistant\n", "The answer is"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=10,
        special_tokens=[PAD, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    trained = json.loads(bpe.to_str())["model"]
    # A dictionary, because the annotations of `Qwen2Tokenizer` forbid pairs and `unk_token=None`.
    settings: dict[str, Any] = dict(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        pad_token=PAD,
        eos_token=STOP,
        additional_special_tokens=[START],
        model_max_length=2048,
    )
    tokenizer = Qwen2Tokenizer(**settings)
    tokenizer.add_tokens([f" {n}" for n in range(100)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

"""Data: records from disk and hub, their order, prompts as tokens."""

import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from eqrl.data import (
    PromptStream,
    StreamState,
    assert_disjoint,
    decode_completions,
    encode_prompts,
    fit_prompts,
    load_records,
    render,
)


RECORDS = [
    {"question": "1 + 1?\u2028", "answer": "2", "level": 1},
    {"question": "\u00e9", "x": [1]},
]


def write_lines(path, records):
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(text + "\n\n", "utf-8")
    return str(path)


def test_load_folder_and_files(tmp_path):
    write_lines(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "test.json").write_text(json.dumps(RECORDS[:1]))
    assert load_records(str(tmp_path), "train") == RECORDS
    assert load_records(str(tmp_path), "test") == RECORDS[:1]
    assert load_records(str(tmp_path / "train.jsonl"), "whatever") == RECORDS


def test_load_refuses(tmp_path):
    folder = str(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2 is no valid JSON"):
        load_records(folder, "bad")
    bad.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3 is no JSON object"):
        load_records(folder, "bad")
    bad.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1 is no valid JSON"):
        load_records(folder, "bad")
    bad.write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        load_records(folder, "bad")
    with pytest.raises(ValueError, match=r"has no train\.jsonl, only \['bad\.jsonl'\]"):
        load_records(folder, "train")
    (tmp_path / "whole.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="holds no list of records"):
        load_records(folder, "whole")
    for missing in (f"{folder}/no/such", "./nothing", "data.jsonl"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            load_records(missing, "train")
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(ValueError, match=r"neither \.jsonl nor \.json"):
        load_records(f"{folder}/data.csv", "train")


def test_load_gsm8k(shared):
    for split, count in (("train", 7473), ("test", 1319)):
        records = load_records(str(shared / "data" / "gsm8k"), split)
        assert len(records) == count
        assert all(record.keys() >= {"question", "answer"} for record in records)


def test_hub_in_offline_mode_is_one_sentence():
    pytest.importorskip("datasets")
    if not os.environ.get("HF_HUB_OFFLINE"):
        pytest.skip("needs HF_HUB_OFFLINE=1 before the hub's libraries are imported")
    with pytest.raises(ValueError, match="could not read 'no-such/data'.*unset HF_HUB_OFFLINE"):
        load_records("no-such/data", "train")


def test_hub_out_of_reach_is_one_sentence_at_once(tmp_path):
    pytest.importorskip("datasets")
    command = (
        "import time; from eqrl.data import load_records\n"
        "import datasets; start = time.monotonic()\n"
        "try: load_records('openai/gsm8k', 'train')\n"
        "except ValueError as error: print(round(time.monotonic() - start, 1), error)"
    )
    # A port nobody listens on, so that no machine asks the real hub.
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    env = os.environ | hub | {"HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", command], env=env, capture_output=True, text=True, timeout=120
    )
    seconds, _, sentence = run.stdout.strip().partition(" ")
    assert run.returncode == 0, run.stderr
    assert float(seconds) < 20, "the hub's own retries take longer"
    assert sentence.startswith("could not read 'openai/gsm8k'") and "\n" not in sentence
    assert "Traceback" not in run.stderr and "Retry" not in run.stderr


@pytest.mark.parametrize("size", [1, 7, 100])
def test_stream_repeats_nothing_within_an_epoch(size):
    stream = PromptStream(size, seed=3)
    epochs = [stream.take(size) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size == 100:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != list(range(size))


@pytest.mark.parametrize("takes", [[100], [1] * 100, [30, 0, 70], [64, 36]])
def test_stream_does_not_depend_on_the_batch_size(takes):
    stream = PromptStream(13, seed=0)
    taken = [index for n in takes for index in stream.take(n)]
    assert taken == PromptStream(13, seed=0).take(100)


def test_stream_resumes():
    stream = PromptStream(10, seed=5)
    for before in range(25):
        state = json.loads(json.dumps(list(stream.state())))
        resumed = PromptStream(10, seed=99)
        resumed.restore(state)
        assert resumed.state() == stream.state() == StreamState(5, *divmod_late(before, 10))
        again = PromptStream(10, seed=5)
        again.take(before)
        assert resumed.take(17) == again.take(17)
        stream.take(1)


def divmod_late(n, size):
    """Epoch and cursor: an epoch is left only when the next one is asked for."""
    return (0, 0) if n == 0 else ((n - 1) // size, (n - 1) % size + 1)


def test_stream_is_what_it_was():
    """The order is part of "same seed, same run": it must not change between versions."""
    assert PromptStream(8, seed=0).take(16) == GOLDEN
    assert PromptStream(8, seed=1).take(16) != GOLDEN
    assert PromptStream(8, seed=2**64 - 1).take(1)


GOLDEN = [0, 2, 1, 5, 4, 3, 6, 7, 5, 3, 7, 2, 4, 1, 0, 6]


def test_stream_refuses():
    with pytest.raises(ValueError, match="`size` is 0"):
        PromptStream(0, seed=0)
    with pytest.raises(ValueError, match="`seed` is -1"):
        PromptStream(5, seed=-1)
    with pytest.raises(ValueError, match="`n` is -1"):
        PromptStream(5, seed=0).take(-1)
    with pytest.raises(ValueError, match="the dataset has 5 records"):
        PromptStream(5, seed=0).restore((0, 0, 6))


def test_disjoint():
    assert_disjoint(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="2 problems .* the first is 'b'"):
        assert_disjoint(["a", "b", "c", "b"], ["c", "b"])


class Letters:
    """A tokenizer of single characters with the interface of Hugging Face's."""

    bos, eos = 1, 2

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def apply_chat_template(self, chat, *, tokenize, add_generation_prompt):
        assert not tokenize
        text = "".join(f"[{message['role']}]{message['content']}" for message in chat)
        return text + "[assistant]" * add_generation_prompt

    def __call__(self, texts, *, add_special_tokens):
        assert isinstance(texts, list)
        first = [self.bos] if add_special_tokens else []
        return {"input_ids": [first + [ord(letter) for letter in text] for text in texts]}

    def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(chr(token) for token in ids if token not in (self.bos, self.eos))


def text_of(ids):
    return "".join(chr(token) for token in ids)


def test_render_with_a_template():
    chat = Letters(chat_template="yes")
    assert text_of(render("hi", chat)) == "[user]hi[assistant]"
    assert text_of(render("hi", chat, system="be")) == "[system]be[user]hi[assistant]"
    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    assert text_of(render(turns, chat, system="be")) == "[system]be[user]a[tool]b[assistant]"


def test_render_without_a_template():
    plain = Letters()
    assert render("hi", plain) == [Letters.bos, *map(ord, "hi")]
    assert text_of(render("hi", plain, system="be")[1:]) == "be\n\nhi"


def test_encode_prompts():
    chat = Letters(chat_template="yes")
    assert encode_prompts([], chat) == []
    many = encode_prompts(["a", "b"], chat, system="be")
    assert many == [render("a", chat, system="be"), render("b", chat, system="be")]


def test_real_tokenizer():
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {
        token: index for index, token in enumerate(["<pad>", "<end>", "<s>", "\u0120", *"abc"])
    }
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    assert render("a b", tokenizer) == [4, 3, 5]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}c{% endif %}"
    )
    assert render("a b", tokenizer, system="c") == [6, 1, 4, 3, 5, 1, 6]
    tokens = np.array([[4, 3, 5, 4, 1, 0]])
    mask = np.array([[False, True, True, True, True, False]])
    assert decode_completions(tokens, mask, tokenizer) == [" ba"]


def test_fit_prompts(caplog):
    prompts = [[1], [1, 2, 3], [], [1, 2]]
    assert fit_prompts([[1], [1, 2]], 2) == [0, 1]
    with pytest.raises(ValueError, match=r"2 of 4 prompts .* longer than 2 tokens .*has 3\)"):
        fit_prompts(prompts, 2)
    with caplog.at_level(logging.WARNING, logger="eqrl"):
        assert fit_prompts(prompts, 2, drop=True) == [0, 3]
    assert "2 of 4 prompts" in caplog.text
    with pytest.raises(ValueError, match="raise the prompt `limit`"):
        fit_prompts([[1, 2]], 1, drop=True)


def test_decode_completions():
    tokens = np.array([[ord("p"), ord("a"), ord("b"), 2, 0], [ord("p"), ord("c"), 0, 0, 0]])
    mask = np.array([[False, True, False, True, False], [False] * 5])
    assert decode_completions(tokens, mask, Letters()) == ["a", ""]


def test_import_is_light():
    start = time.monotonic()
    code = (
        "import sys, eqrl.data, eqrl.rewards\n"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'tyro', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr
    assert time.monotonic() - start < 120

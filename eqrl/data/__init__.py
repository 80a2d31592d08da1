"""Data: records, their order, and prompts as tokens."""

from .load import load_records as load_records
from .split import assert_disjoint as assert_disjoint
from .stream import PromptStream as PromptStream, StreamState as StreamState
from .tokenize import (
    decode_completions as decode_completions,
    encode_prompts as encode_prompts,
    fit_prompts as fit_prompts,
    render as render,
)

"""Decoder models: Qwen2/2.5, Qwen3 and Llama/SmolLM2 in one `Transformer`."""

from ._architecture import Architecture as Architecture
from ._attention import (
    attention as attention,
    attention_head_major as attention_head_major,
    causal as causal,
)
from ._constrain import by_rows as by_rows, constrain as constrain
from ._known import known as known
from ._layer import Layer as Layer
from ._linear import Linear as Linear
from ._load import Loaded as Loaded, architecture_of as architecture_of, load as load
from ._names import abstract as abstract
from ._partition import (
    ACTIVATIONS as ACTIVATIONS,
    PARTITION as PARTITION,
    ROWS as ROWS,
    units as units,
)
from ._previous import previous as previous
from ._resolve import smollm2 as smollm2
from ._rope import RopeScaling as RopeScaling, Rotary as Rotary
from ._save import save as save
from ._tokenizer import load_tokenizer as load_tokenizer
from ._transformer import Transformer as Transformer
from ._value_model import ValueModel as ValueModel
from ._widen import widen_heads as widen_heads

"""Prompts to rollouts: in this process, or by an engine that has a copy of the policy."""

from .base import Sampler as Sampler, Sampling as Sampling
from .decoder import Decoder as Decoder
from .draw import draw as draw
from .engine import (
    Engine as Engine,
    EngineError as EngineError,
    Pending as Pending,
    engine_of as engine_of,
    submit as submit,
)
from .openai import OpenAI as OpenAI
from .own_process import OwnProcess as OwnProcess
from .process_engine import ProcessEngine as ProcessEngine
from .sglang_jax import SGLangJax as SGLangJax
from .turns import Turns as Turns, text_tool as text_tool

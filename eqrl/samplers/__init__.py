"""Prompts to rollouts."""

from .base import Sampler as Sampler
from .decoder import Decoder as Decoder
from .draw import draw as draw

"""Hidden states to log-probs and entropy."""

from .api import (
    Implementation as Implementation,
    LogProbs as LogProbs,
    choose as choose,
    token_logprobs as token_logprobs,
)
from .chunked import chunked as chunked
from .layout import Layout as Layout
from .over_mesh import over_mesh as over_mesh
from .reference import reference as reference

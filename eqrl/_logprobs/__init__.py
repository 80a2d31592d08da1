"""Hidden states to log-probs and entropy."""

from .api import Implementation as Implementation, token_logprobs as token_logprobs
from .chunked import chunked as chunked
from .reference import reference as reference

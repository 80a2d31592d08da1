"""Rewards: plain callables `fn(completion, example) -> float`, and the loop that runs them."""

from .correct import correct as correct
from .format import (
    answer_marker as answer_marker,
    pattern_format as pattern_format,
    reward_format as reward_format,
)
from .named import Reward as Reward, reward_name as reward_name, reward_names as reward_names
from .numbers import extract_number as extract_number, number_after as number_after
from .score import Scored as Scored, score as score
from .tags import tag_count_reward as tag_count_reward
from .weights import weighted as weighted

"""What `Sampling` refuses."""

import pytest

from eqrl.samplers import Sampling


@pytest.mark.parametrize("bad", [{"samples": 0}, {"max_tokens": 0}, {"temperature": -1.0}])
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**{"samples": 1, "max_tokens": 1, "stop_ids": (1,), **bad})

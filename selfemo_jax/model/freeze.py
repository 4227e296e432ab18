"""Weights that training leaves as they are: the embeddings, and the first blocks.

What is frozen has no gradient, no optimizer state and no backward pass: nothing below the lowest trained
block is differentiated. A tree is cut in two by `split`; `join` makes what `decoder.forward` takes of both
parts, and `put_back` writes changed weights into the whole tree.
"""

from typing import Any

import jax
from jax import lax

from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import LOWER, Params


def check_frozen(model: ModelConfig, *, layers: int) -> None:
    """ValueError where every block would be frozen."""
    if layers >= model.num_layers:
        raise ValueError(
            f"model.freeze.layers is {layers} and the model has {model.num_layers} blocks: none would "
            f"learn; set at most {model.num_layers - 1}"
        )


def split(params: Params, *, embeddings: bool, layers: int) -> tuple[Params, Params]:
    """What is trained, and what is frozen: ``embed`` and the first ``layers`` of each stacked weight."""
    trained, frozen = dict(params), {}
    if embeddings:
        frozen["embed"] = trained.pop("embed")
    if layers:
        trained["layers"] = {name: weight[layers:] for name, weight in params["layers"].items()}
        frozen["layers"] = {name: weight[:layers] for name, weight in params["layers"].items()}
    return trained, frozen


def split_spec(tree: Any, *, embeddings: bool) -> Any:
    """The trained part of a tree that describes weights one by one, such as their shardings."""
    return {name: leaf for name, leaf in tree.items() if not (embeddings and name == "embed")}


def join(trained: Params, frozen: Params) -> Params:
    """Both parts as one tree for `decoder.forward`: frozen blocks apart, no gradient into either."""
    frozen = jax.tree.map(lax.stop_gradient, frozen)
    joined = dict(trained)
    if "embed" in frozen:
        joined["embed"] = frozen["embed"]
    if "layers" in frozen:
        joined[LOWER] = frozen["layers"]
    return joined


def put_back(params: Params, trained: Params, *, layers: int) -> Params:
    """The whole tree with the trained part exchanged."""
    whole = params | trained
    if layers:
        whole["layers"] = {
            name: weight.at[layers:].set(trained["layers"][name]) for name, weight in params["layers"].items()
        }
    return whole

"""Plain training of classifiers, so that there is something to prune, and training under masks.

| file | what |
|---|---|
| `loop` | the one training loop: whole or under masks, resumed from checkpoints |
| `fit` | of an NNX model, in place |
| `shrunk` | of the network that a plan leaves of one |
| `optimizers` | the recipe of networks pruned at initialization |
| `evaluation` | accuracy on a test split |
"""

from woodjax.training.evaluation import accuracy, evaluate, evaluate_model
from woodjax.training.fit import fit, train
from woodjax.training.loop import EpochInfo, fit_network
from woodjax.training.optimizers import sgd_recipe
from woodjax.training.shrunk import fit_shrunk, reestimate_shrunk

__all__ = [
    "EpochInfo",
    "accuracy",
    "evaluate",
    "evaluate_model",
    "fit",
    "fit_network",
    "fit_shrunk",
    "reestimate_shrunk",
    "sgd_recipe",
    "train",
]

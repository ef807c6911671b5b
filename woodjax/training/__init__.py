"""Plain training of classifiers, so that there is something to prune, and training under masks.

| file | what |
|---|---|
| `fit` | the one training loop: whole or under masks, resumed from checkpoints |
| `optimizers` | the recipe of networks pruned at initialization |
| `evaluation` | accuracy on a test split |
| `checkpoints` | a training on disk |
"""

from woodjax.training.evaluation import accuracy, evaluate, evaluate_model
from woodjax.training.fit import EpochInfo, fit, train
from woodjax.training.optimizers import sgd_recipe

__all__ = ["EpochInfo", "accuracy", "evaluate", "evaluate_model", "fit", "sgd_recipe", "train"]

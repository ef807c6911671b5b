"""The one-shot methods by name: which curvature, criterion, update and number of stages each is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from jaxtyping import Array, Key

from woodjax.choices import FIXED, Auto, stages_for
from woodjax.compensation import Method
from woodjax.criteria import magnitude_scores, obs_scores
from woodjax.curvature import Curvature, block_fisher, diagonal_fisher, low_rank_fisher
from woodjax.curvature.damping import ONE_PERCENT, Damping, check_damping
from woodjax.masks import make_masks
from woodjax.one_shot import OneShotInfo, Stage, prune_one_shot
from woodjax.tree import apply_masks
from woodjax.typing import Batch, Gradients, LossFn, Masks, Params

__all__ = ["Column", "Recipe", "prune", "recipes"]

Column = Literal["mask", "update", "staged", "first_order"]


@dataclass(frozen=True)
class Recipe:
    """One way to prune; `curvature=None` is magnitude, `"auto"` the no-knob call."""

    title: str
    curvature: Callable[[Gradients], Curvature] | Auto | None
    update: Method | None
    stages: int | Auto = 1
    first_order: bool = False

    def stages_to(self, sparsity: float) -> int:
        """Stages that it takes to a sparsity.

        Args:
            sparsity: Fraction to prune.

        Returns:
            Their number.
        """
        return stages_for(sparsity, first_order=self.first_order) if self.stages == "auto" else self.stages

    @property
    def column(self) -> Column:
        """Which column of a results table it belongs to; columns are never compared blindly."""
        if self.first_order:
            return "first_order"
        if self.stages == "auto" or self.stages > 1:
            return "staged"
        return "mask" if self.update is None else "update"


def recipes(*, damping: Damping = ONE_PERCENT, block_size: int = 512, stages: int = 16) -> dict[str, Recipe]:
    """The methods of the command line and the benchmarks.

    Args:
        damping: Of every Fisher: a number, a fraction of the mean diagonal, or `"auto"`.
        block_size: Block size of `woodfisher` and `woodfisher-staged`.
        stages: Stages of the staged methods.

    Returns:
        Recipes by name.

    Raises:
        ValueError: `stages < 2`: a staged method would be called so without being it. Block size or damping
            not positive.
    """
    check_damping(damping)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: pass at least 1.")
    if stages < 2:
        raise ValueError(f"stages is {stages}: the staged methods need at least 2.")
    diagonal = partial(diagonal_fisher, damping=damping)
    blocks = partial(block_fisher, block_size=block_size, damping=damping)
    whole = partial(low_rank_fisher, damping=damping)
    return {
        "magnitude": Recipe("Magnitude", None, None),
        "diagonal": Recipe("Diagonal Fisher", diagonal, None),
        "woodfisher": Recipe(f"WoodFisher, blocks of {block_size}, sum", blocks, "sum"),
        "woodfisher-staged": Recipe(f"WoodFisher, blocks, sum, {stages} stages", blocks, "sum", stages),
        "sum": Recipe("Whole Fisher, sum", whole, "sum"),
        "joint": Recipe("Whole Fisher, joint", whole, "joint"),
        "joint-staged": Recipe(f"Whole Fisher, joint, {stages} stages", whole, "joint", stages),
        "auto": Recipe("No knobs", "auto", None, "auto"),
        "auto-first-order": Recipe("No knobs, first order", "auto", None, "auto", first_order=True),
    }


def prune(
    recipe: Recipe,
    loss_fn: LossFn,
    params: Params,
    pool: Batch,
    sparsity: float,
    *,
    examples: int,
    key: Key[Array, ""],
    microbatch_size: int = 64,
    on_stage: Callable[[Stage], None] | None = None,
) -> tuple[Params, Masks, OneShotInfo | None]:
    """Prune by a recipe, globally.

    Args:
        recipe: What to do.
        loss_fn: Loss of one example.
        params: The trained network.
        pool: Examples, `[n, ...]`.
        sparsity: Fraction to prune.
        examples: Fresh examples of the pool for each stage; 0 leaves that to a recipe without knobs.
        key: Shuffles the pool.
        microbatch_size: Gradient rows computed at once.
        on_stage: Called after each stage.

    Returns:
        Pruned parameters, masks, and what was done (None for magnitude, which sees no data).

    Raises:
        ValueError: As `woodjax.prune_one_shot`.
    """
    if recipe.curvature is None:
        masks = make_masks(magnitude_scores(params), sparsity)
        pruned = apply_masks(params, masks)
        if on_stage is not None:
            on_stage(Stage(pruned, masks, None))
        return pruned, masks, None
    run: Callable[..., tuple[Params, Masks, OneShotInfo]] = partial(
        prune_one_shot, loss_fn, params, pool, sparsity, key=key, microbatch_size=microbatch_size, on_stage=on_stage
    )
    if recipe.curvature == "auto":
        return run(first_order=recipe.first_order, examples_per_stage=examples or None)
    return run(
        **{**FIXED, "stages": recipe.stages, "method": recipe.update},
        examples_per_stage=examples,
        curvature=recipe.curvature,
        criterion=obs_scores,
    )

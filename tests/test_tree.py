"""Trees to blocks and back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import woodjax as wj

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


def numbered(shapes):
    """Every coordinate has its own number, from 1."""
    leaves, start = {}, 1
    for i, shape in enumerate(shapes):
        size = int(np.prod(shape))
        leaves[f"leaf{i}"] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return leaves


@partial(jax.jit, static_argnames=("layout", "lead"))
def there_and_back(tree, layout, lead):
    """One program for each example: hardly anything else here takes time."""
    blocks = layout.to_blocks(jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), tree))
    return blocks, layout.to_tree(blocks[0] if lead else blocks, fill=-1)


@settings(max_examples=20)
@given(shapes=SHAPES, block_size=st.one_of(st.none(), st.integers(1, 40)), lead=st.sampled_from([(), (3,)]))
def test_blocks_hold_each_weight_once_and_zeros_besides_and_go_back(shapes, block_size, lead):
    tree = numbered([(2, 2), *shapes])
    layout = wj.make_layout(tree, block_size=block_size)
    blocks, back = jax.device_get(there_and_back(tree, layout, lead))
    assert blocks.shape == (*lead, layout.num_blocks, layout.block_size)
    expected = np.concatenate([x.reshape(-1) for x in tree.values() if x.ndim >= 2])
    for one in blocks if lead else [blocks]:
        np.testing.assert_array_equal(one[one != 0], expected)
    assert layout.num_weights == expected.size
    for spec, before, after in zip(layout.leaves, jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(after, before if len(spec.shape) >= 2 else -np.ones(spec.shape))


def test_blocks_do_not_cross_leaves():
    layout = wj.make_layout({"a": np.ones((2, 3)), "b": 2 * np.ones((2, 2))}, block_size=4)
    blocks = np.asarray(layout.to_blocks({"a": np.ones((2, 3)), "b": 2 * np.ones((2, 2))}))
    np.testing.assert_array_equal(blocks, [[1, 1, 1, 1], [1, 1, 0, 0], [2, 2, 2, 2]])


def test_blocks_do_not_cross_stacked_layers():
    stacked = np.array([[[1, 1, 1]], [[2, 2, 2]]], np.float32)  # two layers of shape (1, 3)
    layout = wj.make_layout({"w": stacked}, block_size=2, batch_axes=1)
    np.testing.assert_array_equal(layout.to_blocks({"w": stacked}), [[1, 1], [1, 0], [2, 2], [2, 0]])


def test_a_stacked_norm_scale_is_not_a_kernel():
    tree = {"kernel": np.ones((4, 3, 2)), "scale": np.ones((4, 2))}
    selected = wj.make_layout(tree, batch_axes=1).selected
    assert [spec.path for spec in selected] == ["kernel"]


def test_block_size_is_clipped_to_the_largest_layer():
    assert wj.make_layout({"a": np.ones((2, 3)), "b": np.ones((2, 2))}, block_size=999).block_size == 6


def test_select_by_path():
    layout = wj.make_layout(numbered([(2, 2), (3, 3)]), select=lambda path, leaf: path == "leaf1")
    assert [spec.path for spec in layout.selected] == ["leaf1"]


def test_small_floats_become_float32_in_blocks():
    tree = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    assert wj.make_layout(tree, block_size=2).to_blocks(tree).dtype == jnp.float32


def test_layout_is_static():
    tree = numbered([(2, 2), (3,)])
    assert hash(wj.make_layout(tree, block_size=2)) == hash(wj.make_layout(tree, block_size=2))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert wj.make_layout(shapes, block_size=2) == wj.make_layout(tree, block_size=2)


@pytest.mark.parametrize(
    ("tree", "options", "message"),
    [
        ({"w": np.ones((2, 2), int)}, {}, "Leaf 'w' is int64"),
        ({"w": np.ones((0, 2))}, {}, "Leaf 'w' is empty"),
        ({"b": np.ones(2)}, {}, r"No leaf is selected.*\['b'\]"),
        ({"w": np.ones((2, 2))}, {"block_size": 0}, "block_size is 0"),
        ({"w": np.ones((2, 2))}, {"batch_axes": -1}, "batch_axes is -1"),
    ],
)
def test_bad_trees(tree, options, message):
    with pytest.raises(ValueError, match=message):
        wj.make_layout(tree, **options)


def test_another_tree_or_shape_is_refused():
    layout = wj.make_layout({"w": np.ones((2, 2)), "v": np.ones((2, 3))})
    with pytest.raises(ValueError, match="Tree structure"):
        layout.to_blocks({"w": np.ones((2, 2))})
    with pytest.raises(ValueError, match=r"Leaf 'w' has shape \(2, 5\), expected \(2, 2\)"):
        layout.to_blocks({"w": np.ones((2, 5)), "v": np.ones((2, 3))})


def test_apply_masks_removes_what_is_not_finite():
    pruned = wj.apply_masks({"w": jnp.array([jnp.nan, -1.0, -jnp.inf])}, {"w": jnp.array([False, True, False])})
    np.testing.assert_array_equal(pruned["w"], [0, -1, 0])
    assert not np.signbit(np.asarray(pruned["w"])[[0, 2]]).any()
    with pytest.raises(ValueError, match="another tree structure"):
        wj.apply_masks({"w": jnp.ones(2)}, {"v": jnp.ones(2, bool)})
    for leaf, mask in (((3, 2), (3,)), ((2,), (3, 2)), ((3, 2), (1, 2))):
        with pytest.raises(ValueError, match="The mask of leaf 'w' has shape"):
            wj.apply_masks({"w": jnp.ones(leaf)}, {"w": jnp.ones(mask, bool)})
    with pytest.raises(ValueError, match="leaf 'w' is float32; masks are bool"):
        wj.apply_masks({"w": jnp.ones(2)}, {"w": jnp.ones(2)})

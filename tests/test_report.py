"""The report says what the trees and the info say, is one well-formed file, and refuses what it cannot read."""

import subprocess
import sys
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import woodjax as wj
from woodjax.plots import (
    draw_accuracy,
    draw_kept,
    draw_mask,
    draw_predicted_loss,
    draw_updates,
    draw_weights,
    kept_cells,
)
from woodjax.records import Result
from woodjax.report import report

pytestmark = pytest.mark.newest  # pictures and markup: no version of JAX changes them
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Reads a page; fails where a tag is closed that is not the innermost open one."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.tags = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named[key] for key in ("href", "src", "xlink:href", "srcset", "data", "action") if key in named]
        if tag == "svg":
            assert named["role"] == "img"
            assert named["aria-label"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() and self.open[-1] != "style" else []

    def after(self, text):
        return self.text[self.text.index(text) + 1]


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(0)
    before = {
        "conv": {"bias": np.ones(4), "kernel": rng.normal(size=(3, 3, 2, 4))},
        "head": {"kernel": rng.normal(size=(4, 5))},
    }
    before = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), before)
    masks = wj.make_masks(wj.magnitude_scores(before), {"conv/kernel": 0.75, "head/kernel": 0.4})
    after = wj.apply_masks(jax.tree.map(lambda x: 1.5 * x, before), masks)
    return before, after, masks


def info_of(stages, leaves=3):
    ones = jnp.ones(stages)
    return wj.OneShotInfo(
        sparsity=jnp.linspace(0.3, 0.6, stages),
        predicted_loss_change=0.25 * ones,
        loss_before=jnp.arange(stages) * 0.5,
        loss_after=jnp.arange(stages) * 0.5 + 0.125,
        damping=1e-3 * ones,
        raised=jnp.zeros(stages, int).at[0].set(2),
        nonfinite=jnp.zeros((stages, leaves), bool).at[0, 2].set(True),
        rows=jnp.full(stages, 77),
        examples_per_gradient=jnp.full(stages, 3),
        held_out=jnp.full(stages, 9),
        choice=None,
    )


@pytest.fixture(scope="module")
def whole(trees):
    def evaluate(params):  # of the three networks: before, after, without the smallest
        values = {float(w): a for w, a in zip([total(t) for t in trees[:2]], (0.9, 0.8), strict=True)}
        return values.get(total(params), 0.7)

    total = lambda tree: float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))
    page = report(
        *trees,
        info_of(4),
        evaluate=evaluate,
        magnitude=True,
        history=[(0.25, 0.85)],
        apply_fn=lambda p, x: (
            jax.lax.conv(x, p["conv"]["kernel"].transpose(3, 2, 0, 1), (1, 1), "SAME").mean((2, 3))
            @ p["head"]["kernel"]
        ),
        example=jnp.zeros((1, 2, 5, 5)),
        seconds=12.5,
        title="A & B",
        notes="First.\n\nSecond <i>.",
    )
    return page, Reader(page.html)


def test_one_well_formed_file_that_loads_nothing(whole):
    page, reader = whole
    assert len(reader.ids) == len(set(reader.ids))
    inside = [link for link in reader.links if link.startswith("#")]
    assert {link[1:] for link in inside} <= set(reader.ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
    assert "script" not in reader.tags
    assert "://" not in page.html
    assert "@import" not in page.html
    assert reader.tags.count("svg") == 1 + 1 + 1 + 2 + 2  # accuracy, layers, loss, weights and moves, masks


def test_numbers_are_those_of_the_trees(whole):
    _, reader = whole
    # 18 of 72 and 12 of 20 survive.
    assert reader.after("Sparsity") == "67.39 %"
    assert reader.after("Weights kept") == "30"
    assert "62 of 92 weights are gone" in reader.text
    assert reader.after("Accuracy before") == "90.00 %"
    assert reader.after("Accuracy after") == "80.00 %"
    assert "−10.00 points" in reader.text
    assert reader.after("Magnitude") == "70.00 %"
    assert reader.after("Predicted loss change") == "1"
    assert reader.after("Measured loss change") == "0.5"
    row = reader.text.index("3 × 3 × 2 × 4")
    assert reader.text[row - 1 : row + 4] == ["conv/kernel", "3 × 3 × 2 × 4", "72", "18", "25.00 %"]
    assert reader.after("bytes, dense") == "368"
    assert reader.after("bytes, survivors and a bit a weight") == str(30 * 4 + 9 + 3)
    assert reader.after("bytes, CSR with 32-bit indices") == str(30 * 8 + 4 * (18 + 1) + 4 * (4 + 1))
    assert reader.after("multiply-adds of these leaves, dense") == f"{72 * 25 + 20:,}"
    assert reader.after("multiply-adds with a survivor") == f"{18 * 25 + 12}"
    assert reader.after("seconds that the pruning took") == "12.5"
    assert "Factors that failed and took more damping: 2." in reader.text
    assert any(text.startswith("head/kernel: masks and weights were kept") for text in reader.text)
    assert any("gradient rows 77" in text for text in reader.text)


def test_what_is_not_known_is_absent(trees):
    before, _, masks = trees
    reader = Reader(report(before, wj.apply_masks(before, masks), masks).html)
    for absent in ("Accuracy and sparsity", "How it was pruned", "Predicted loss change"):
        assert absent not in reader.text
    assert reader.tags.count("svg") == 1 + 1 + 2  # nothing moved
    assert "seconds that the pruning took" not in reader.text


def test_names_stay_text(trees):
    name = '<script>alert("$x")</script>'
    before, after, masks = ({name: tree["head"]} for tree in trees)
    page = report(before, after, masks, title=name, notes=name)
    reader = Reader(page.html)
    assert "script" not in reader.tags
    assert f"{name}/kernel" in reader.text
    frame = Reader(page._repr_html_())
    assert frame.tags == ["iframe"]


def test_saved_as_it_stands(whole, tmp_path):
    page, _ = whole
    assert page.save(tmp_path / "report.html").read_text(encoding="utf-8") == page.html


def evil(tree, path, leaf):
    layer, name = path.split("/")
    return {**tree, layer: {**tree[layer], name: leaf}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, a, m: (b, {"conv": a["conv"]}, m), "after .* has the structure"),
        (lambda b, a, m: (b, evil(a, "head/kernel", jnp.ones((4, 2))), m), "'head/kernel' has shape"),
        (lambda b, a, m: (b, a, evil(m, "head/kernel", jnp.ones((4, 5)))), "'head/kernel' is float32; masks are bool"),
        (lambda b, a, m: (evil(b, "head/kernel", jnp.ones((4, 5), int)), a, m), "'head/kernel' is int32"),
        (lambda b, a, m: (b, evil(a, "head/kernel", jnp.full((4, 5), jnp.nan)), m), "after: .*'head/kernel' has 20"),
        (lambda b, a, m: (b, b, m), "'conv/kernel' has 54 weights that masks prune.*apply_masks"),
        (lambda b, a, m: tuple(evil(t, "head/kernel", t["head"]["kernel"][:0]) for t in (b, a, m)), "no weights"),
        (lambda b, a, m: tuple({"bias": t["conv"]["bias"]} for t in (b, a, m)), "Nothing is prunable"),
        (lambda b, a, m: ({}, {}, {}), "Nothing is prunable"),
    ],
)
def test_bad_trees(trees, change, message):
    with pytest.raises(ValueError, match=message):
        report(*change(*trees))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"info": object()}, "info is a object: pass .* GuaranteeInfo"),
        ({"evaluate": lambda _: 93.1}, "93.1: evaluate and history give fractions"),
        ({"evaluate": lambda _: np.nan}, "nan"),
        ({"history": [(0.5, 0.9)]}, "pass evaluate"),
        ({"magnitude": True}, "pass evaluate"),
        ({"evaluate": lambda _: 0.9, "history": [(50, 0.9)]}, "history has the sparsity 50"),
        ({"apply_fn": lambda p, x: x}, "both apply_fn and example"),
    ],
)
def test_bad_options(trees, options, message):
    with pytest.raises(ValueError, match=message):
        report(*trees, **options)


def test_every_info_is_told(trees):
    names = ["a", "b", "c"]
    one = jnp.ones(())
    refresh = wj.RefreshInfo(one, 0.5 * one, 0.25 * one, one, 2 * one, one, 0 * one, jnp.ones(3), jnp.zeros(3, bool))
    rungs, mean, p_value = np.array([0.5, 0.9]), np.array([0.01, np.nan]), np.array([0.02, np.nan])
    promise = wj.GuaranteeInfo(0.5, True, 0.95, 0.05, 1.0, 40, rungs, mean, p_value, rungs < 0.8, info_of(2))
    collapse = wj.CollapseReport({"empty": jnp.zeros(())}, jnp.ones((), int), jnp.zeros(()), jnp.ones(()))
    infos = [
        refresh,
        refresh,
        promise,
        wj.AtInitInfo({}, collapse, jnp.zeros((), int)),
        wj.SearchInfo(jnp.array([3.0, 2.0]), jnp.array([4, 5]), jnp.zeros((), int), jnp.full((), 6)),
        wj.ExactObsInfo(jnp.zeros((2, 3), int), jnp.zeros((2, 3)), jnp.array([1, 2]), 0.5 * one),
        wj.LayerInfo(3, 0.5, {"q": 0.25}, {"q": 0.01}, {"q": 0.125}),
        wj.SparsityPath(rungs, np.array([0.1, 0.2]), {}),
        wj.PrunePlan((), (), "all", "raise"),
    ]
    from woodjax.report.infos import tell

    story = tell(infos, names)
    tables = {table.caption: table for table in story.tables}
    assert len(tables["Refreshes"].rows) == 2  # one table of both
    assert [row[-1] for row in tables["Sparsities tested, in this order"].rows] == ["yes", "not tested"]
    assert tables["At initialization"].rows[2][1] == "empty"
    assert tables["Mask search"].rows[2][1] == "9"
    assert tables["Exact removal"].rows[1][1] == "3"
    assert tables["Layers, one at a time"].rows == (("3", "q", "25.00 %", "0.01", "0.125"),)
    assert story.predicted.tolist() == [0.25, 0.25, 0.25, 0.25, 2.0, 0.5]
    assert story.measured[:4].tolist() == [1.0, 1.0, 0.125, 0.125]
    assert len(story.sparsity) == len(story.measured) == 6
    assert tell(None, names).tables == ()


def test_cells_average_to_the_density():
    mask = np.random.default_rng(1).random((3, 7, 10)) < 0.3
    cells = kept_cells(mask, 4)
    assert cells.shape == (4, 4)
    # Runs of 1, 2, 2, 2 rows and of 2, 3, 2, 3 columns.
    assert np.outer([1, 2, 2, 2], [2, 3, 2, 3]).ravel() @ cells.ravel() / 70 == pytest.approx(mask.mean(), abs=1e-6)
    assert np.array_equal(kept_cells(mask[0]), mask[0])


def test_pictures_show_what_they_are_given():
    point = lambda s: Result("m", "M", "mask", s, s, 0.5, 0.0, None, None, {})
    axes = Figure().subplots()
    draw_accuracy(axes, [point(0.5), point(0.9), point(0.9001)], dense=0.9)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "90"]  # labels do not overlap
    axes = Figure().subplots()
    draw_kept(axes, {"a": 0.5, "b$": 0.25})
    assert [bar.get_width() for bar in axes.patches] == [50, 25]
    axes = Figure().subplots()
    draw_predicted_loss(axes, [0.1, 0.2], [0.3, np.nan], sparsity=[0.5, 0.9])
    assert [list(line.get_ydata()[:1]) for line in axes.lines[1:]] == [[0.1], [0.3]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "90"]
    axes = Figure().subplots()
    assert draw_mask(axes, np.eye(3, dtype=bool)).get_array().tolist() == np.eye(3).tolist()
    axes = Figure().subplots()
    weights = np.linspace(-1, 1, 50)
    draw_weights(axes, [weights, weights], [weights[:7]])
    assert [patch.get_data().values.sum() for patch in axes.patches] == [100, 7]
    axes = Figure().subplots()
    draw_updates(axes, [np.zeros(4)])
    assert axes.patches[0].get_data().values.sum() == 4


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda axes: draw_kept(axes, {}), "no leaves"),
        (lambda axes: draw_mask(axes, np.ones((2, 2))), "bool mask of a kernel"),
        (lambda axes: draw_predicted_loss(axes, [1.0], [], sparsity=[0.5]), "one of each for every stage"),
        (lambda axes: draw_updates(axes, []), "no weights to draw"),
        (lambda axes: draw_weights(axes, [np.array([np.inf])], []), "not finite"),
    ],
)
def test_pictures_refuse(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(Figure().subplots())


def test_matplotlib_is_not_imported_with_the_library():
    code = "import sys, woodjax; sys.exit('matplotlib' in sys.modules or 'woodjax.report' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_magnitude_prunes_the_leaves_that_were_pruned():
    """As many of the smallest weights, of what the pruning touched; the small weights of the head stay."""
    before = {"h": jnp.arange(1.0, 7.0).reshape(2, 3), "head": jnp.full((2, 2), 0.1)}
    masks = {"h": jnp.array([[True, False, True], [False, True, False]]), "head": jnp.ones((2, 2), bool)}
    seen = []
    report(before, wj.apply_masks(before, masks), masks, evaluate=lambda p: seen.append(p) or 0.5, magnitude=True)
    assert any((tree["h"] == jnp.array([[0.0, 0.0, 0.0], [4.0, 5.0, 6.0]])).all() for tree in seen)
    assert all((tree["head"] == before["head"]).all() for tree in seen)

"""Docstrings of the public face say what the contributing guide promises: arguments, results, errors, cost, source."""

import ast
import inspect
import re
import textwrap

import pytest
from public_api import members, public_objects

pytestmark = pytest.mark.newest

SECTION = re.compile(r"^(Args|Attributes|Cost|Example|Raises|References|Returns|Yields):$", re.MULTILINE)
ENTRY = re.compile(r"^    \*{0,2}(\w+(?:, \w+)*):", re.MULTILINE)
NAMED = {f"{module}.{name}": value for module, name, value in public_objects()}
FUNCTIONS = {name: value for name, value in NAMED.items() if inspect.isfunction(inspect.unwrap(value))}
CLASSES = {name: value for name, value in NAMED.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{member}": getattr(what, "__func__", getattr(what, "fget", what))
    for name, cls in CLASSES.items()
    for member, what in members(cls)
}
TOP = {name: value for name, value in FUNCTIONS.items() if name.count(".") == 1}

# A computation names its source: the paper or the identity that it is. These compute nothing new.
WITHOUT_SOURCE = {
    "looks at a loss, a program or a network": (
        "check_loss check_rebuilt collectives count_macs gathered_bytes largest_gather mean_gradient measure "
        "microbatch_for stream_gradients weight_macs"
    ),
    "arithmetic of trees, masks, shapes and counts": (
        "apply_masks contract cost_table expand_group_masks is_kernel make_layout make_plan mask_sparsity "
        "masks_from_params nonfinite_scores path_name prune_count split_batch"
    ),
    "a control that is random": "random_channel_scores random_scores",
    "a schedule without a formula": "linear_schedule one_shot_schedule schedule_of",
    "reads or writes a state, a file or another form": (
        "find_state from_bcoo get_info get_masks load_arrays load_masks load_pruned load_stablehlo "
        "refresh_masks save_masks save_pruned set_masks shrink_groups shrunk_network to_bcoo unpack_nm"
    ),
    "chooses among functions that name theirs": "choose_update empirical_fisher estimate fitting_cost",
    "talks to other processes": "fail_together",
}


# Shown by the example of their other half.
SHOWN_WITH = {
    "load_masks": "save_masks",
    "load_pruned": "save_pruned",
    "load_stablehlo": "export_stablehlo",
    "unpack_nm": "pack_nm",
}


def sections(value):
    parts = SECTION.split(inspect.getdoc(value) or "")
    return {"Summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def parameters(value):
    names = list(inspect.signature(value).parameters)
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def documented(value):
    named = [name for entry in ENTRY.findall(sections(value).get("Args", "")) for name in entry.split(", ")]
    returned = inspect.signature(value).return_annotation in (None, "None") or {"Returns", "Yields"} & set(
        sections(value)
    )
    return sorted(named) == sorted(parameters(value)) and bool(returned)


def raises_value_error(value):
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value))))
    return any("ValueError" in ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc)


def takes_arrays(value):
    shown = " ".join(str(p.annotation) for p in inspect.signature(value).parameters.values())
    return re.search(r"jaxtyping|PyTree|Array|ndarray", shown) is not None


def test_every_object_has_a_summary_of_one_line():
    for name, value in (FUNCTIONS | CLASSES | METHODS).items():
        lines = sections(value)["Summary"].splitlines()
        assert lines, name
        assert lines[0].endswith((".", "?")), name
        assert len(lines) == 1 or not lines[1], name


def test_functions_name_their_arguments_and_results():
    assert [name for name, value in FUNCTIONS.items() if not documented(value)] == []


def test_methods_name_their_arguments_and_results():
    """Once for each question: one that answers a protocol, or a base class, says in one line what is its own."""
    bases = {base for cls in CLASSES.values() for base in cls.__mro__ if base.__module__.startswith("woodjax")}
    owned = [(name, getattr(what, "__func__", what)) for base in bases for name, what in vars(base).items()]
    full = {name for name, what in owned if inspect.isfunction(inspect.unwrap(what)) and documented(what)}
    for name, value in METHODS.items():
        if "Args" in sections(value):
            assert documented(value), name
        elif parameters(value):
            assert name.rsplit(".", 1)[1] in full, name


def test_value_errors_are_announced():
    for name, value in (FUNCTIONS | METHODS).items():
        if raises_value_error(value):
            assert "ValueError" in sections(value).get("Raises", ""), name


def test_what_takes_arrays_says_what_it_costs():
    assert [name for name, value in TOP.items() if takes_arrays(value) and "Cost" not in sections(value)] == []


def test_computations_name_their_source():
    excused = [name for names in WITHOUT_SOURCE.values() for name in names.split()]
    missing = {name.removeprefix("woodjax.") for name, value in TOP.items() if "References" not in sections(value)}
    assert missing == set(excused)
    assert len(excused) == len(set(excused))


def test_every_function_shows_an_example():
    examples = {name.removeprefix("woodjax."): sections(value).get("Example", "") for name, value in TOP.items()}
    assert {name for name, example in examples.items() if ">>>" not in example} == SHOWN_WITH.keys()
    for name, other in SHOWN_WITH.items():
        assert f"wj.{name}(" in examples[other]

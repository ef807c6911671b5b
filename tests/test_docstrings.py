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
PUBLIC = [(f"{module}.{name}", value) for module, name, value in public_objects()]
FUNCTIONS = [(name, value) for name, value in PUBLIC if inspect.isfunction(inspect.unwrap(value))]
CLASSES = [(name, value) for name, value in PUBLIC if inspect.isclass(value)]
METHODS = [
    (f"{name}.{member}", getattr(what, "__func__", getattr(what, "fget", what)))
    for name, cls in CLASSES
    for member, what in members(cls)
]


def sections(value):
    parts = SECTION.split(inspect.getdoc(value) or "")
    return {"Summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def defects(value):
    """What is wrong with the docstring of a function."""
    found = sections(value)
    parameters = list(inspect.signature(value).parameters)
    if parameters and parameters[0] in ("self", "cls"):
        del parameters[0]
    named = [name for entry in ENTRY.findall(found.get("Args", "")) for name in entry.split(", ")]
    if sorted(named) != sorted(parameters):
        yield f"Args are {named}, parameters {parameters}"
    returned = inspect.signature(value).return_annotation
    if returned not in (None, "None", inspect.Signature.empty) and not {"Returns", "Yields"} & found.keys():
        yield "no Returns"
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value))))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    if any("ValueError" in ast.unparse(error) for error in raised) and "ValueError" not in found.get("Raises", ""):
        yield "no Raises"


@pytest.mark.parametrize(
    ("name", "value"), PUBLIC_TEXTS := FUNCTIONS + CLASSES + METHODS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_summary(name, value):
    lines = sections(value)["Summary"].splitlines()
    assert lines
    assert lines[0].endswith((".", ":"))
    assert len(lines) == 1 or not lines[1]

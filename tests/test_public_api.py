"""The public face is what `public_api.txt` says: a changed name or signature is seen in review."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
from public_api import FILE, MODULES, lines

import woodjax

pytestmark = pytest.mark.newest


def test_the_list_is_current():
    committed, found = FILE.read_text().splitlines(), list(lines())
    gone, new = sorted(set(committed) - set(found)), sorted(set(found) - set(committed))
    assert committed == found, (
        f"gone: {gone}; new: {new}. If on purpose: python tests/public_api.py, and the changelog."
    )


@pytest.mark.parametrize("name", MODULES)
def test_names_are_sorted_and_there(name):
    module = importlib.import_module(name)
    rank = lambda n: (not n.isupper(), not n[0].isupper(), n)
    assert list(module.__all__) == sorted(set(module.__all__), key=rank)
    assert set(module.__all__) <= set(dir(module))


def test_nothing_else_but_submodules_at_the_top():
    submodules = {name for _, name, _ in pkgutil.iter_modules(woodjax.__path__)}
    others = {name for name in dir(woodjax) if not name.startswith("_")} - set(woodjax.__all__)
    assert others <= submodules


def test_public_names_are_defined_in_the_library():
    for name in woodjax.__all__:
        value = getattr(woodjax, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith("woodjax."), name


def test_import_takes_no_extra():
    extras = ("array_record", "chex", "equinox", "flax", "grain", "matplotlib", "orbax", "PIL", "rich", "safetensors")
    extras += ("scipy.special", "scipy.stats", "sklearn", "tensorflow", "tensorflow_datasets")
    code = f"import sys, woodjax; print(*(name for name in {extras} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == []

"""The public face, one name a line: what a change of it changes. `python tests/public_api.py` writes the list anew."""

import importlib
import inspect
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")

# Whose `__all__` is public; the rest of the package is not, though it can be imported.
MODULES = (
    "woodjax",
    "woodjax.adapters.linen",
    "woodjax.adapters.nnx",
    "woodjax.checkpoints",
    "woodjax.datasets",
    "woodjax.linalg",
    "woodjax.models",
    "woodjax.plots",
    "woodjax.recipes",
    "woodjax.records",
    "woodjax.report",
    "woodjax.training",
    "woodjax.typing",
)


def public_objects():
    """`(module, name, object)` of every public name; one that is exported twice counts where it comes first."""
    seen = set()
    for module in MODULES:
        names = importlib.import_module(module)
        for name in names.__all__:
            value = getattr(names, name)
            if (name, id(value)) not in seen:
                seen.add((name, id(value)))
                yield module, name, value


def members(cls):
    """`(name, member)` of the public methods and properties that a class has from the library."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("woodjax"):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    fields = set(getattr(cls, "_fields", ())) | set(getattr(cls, "__dataclass_fields__", ()))
    for name, value in sorted(found.items()):
        if name not in fields and (callable(value) or isinstance(value, property | classmethod | staticmethod)):
            yield name, value


def signature(function):
    """Names, kinds and defaults: annotations are the type checker's to watch."""
    shown = [_bare(parameter) for parameter in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(shown))


def _bare(parameter):
    default = parameter.default
    if default is not parameter.empty and repr(default).startswith("<"):
        default = _Named(default)
    return parameter.replace(annotation=parameter.empty, default=default)


class _Named:
    def __init__(self, value):
        self.name = getattr(value, "__name__", type(value).__name__)

    def __repr__(self):
        return self.name


def lines():
    """The list."""
    for module, name, value in public_objects():
        full = f"{module}.{name}"
        if inspect.isclass(value):
            yield f"class {full}{signature(value)}"
            for member, what in members(value):
                function = getattr(what, "__func__", what)
                yield f"    {full}.{member}" + ("" if isinstance(what, property) else signature(function))
        elif callable(value) and inspect.isroutine(inspect.unwrap(value)):
            yield f"{full}{signature(value)}"
        else:
            yield full


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()))

"""How the reference reads the source: what Griffe alone takes for something else."""

import re
from typing import Any

import griffe

ONE_EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)
FIELDS = re.compile(r"^Args:$", flags=re.MULTILINE)


class HouseDocstrings(griffe.Extension):
    """`Example:` is code, fields of a named tuple are attributes, a function hides the module of its name."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """`from woodjax.exact_obs import exact_obs` gives the function, where the tree of files gives the module."""
        _spell_headings(pkg)
        loader.resolve_aliases(implicit=True, external=False)
        packages = [member for member in pkg.members.values() if not member.is_alias and member.is_subpackage]
        for package in [*packages, pkg]:  # the root last: what it imports has come from the others
            hidden = {
                name: loader.modules_collection[path]
                for name, path in package.imports.items()
                if path.startswith(pkg.path) and package.members[name].is_module
            }
            for name, found in hidden.items():
                package.members[name] = griffe.Alias(name, found, parent=package)


def _spell_headings(found: griffe.Object) -> None:
    if found.docstring is not None:
        text = ONE_EXAMPLE.sub("Examples:", found.docstring.value)
        named_tuple = isinstance(found, griffe.Class) and "NamedTuple" in map(str, found.bases)
        found.docstring.value = FIELDS.sub("Attributes:", text) if named_tuple else text
    for member in found.members.values():
        if not member.is_alias:
            _spell_headings(member)

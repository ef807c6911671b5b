"""How the reference reads the source: what Griffe alone takes for something else."""

import re
from typing import Any

import griffe

ONE_EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)
FIELDS = re.compile(r"^Args:$", flags=re.MULTILINE)


class HouseDocstrings(griffe.Extension):
    """`Example:` is code, fields of a named tuple are attributes, and a function hides the module that it is named after."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Headings of sections as Griffe spells them."""
        if obj.docstring is None:
            return
        obj.docstring.value = ONE_EXAMPLE.sub("Examples:", obj.docstring.value)
        if obj.is_class and "NamedTuple" in map(str, obj.bases):
            obj.docstring.value = FIELDS.sub("Attributes:", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """`from woodjax.exact_obs import exact_obs` gives the function, where the tree of files gives the module."""
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

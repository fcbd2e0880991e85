"""What ``mkdocs build`` takes from the code: the options, and whether the pages name everything that is public.

``options.md`` is filled from ``fedrot.AggregationOptions``, so that an option is described once. ``methods.md`` must name
every method of the registry and have the facts that its class states, and ``api.md`` must hold every name of ``__all__``.
The build fails otherwise.
"""

import ast
import dataclasses
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent
# The packages whose public names api.md must show, with the file that lists them.
PUBLIC = {
    "fedrot": "fedrot/__init__.py",
    "fedrot.flower": "fedrot/flower/__init__.py",
    "fedrot.nvflare": "fedrot/nvflare.py",
    "fedrot.simulation": "fedrot/simulation/__init__.py",
    "fedrot_kernels": "fedrot_kernels/__init__.py",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the options page, and check the methods page."""
    if page.file.src_uri == "options.md":
        return markdown.replace("<!-- options -->", options_markdown(_fedrot().AggregationOptions))
    if page.file.src_uri == "methods.md":
        check_methods(markdown, _fedrot().METHODS)
    return markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Check that the reference holds every public name."""
    if page.file.src_uri == "api.md":
        names = [f"{package}.{name}" for package, file in PUBLIC.items() for name in public_names(ROOT / file)]
        if missing := [name for name in names if f'id="{name}"' not in html]:
            raise PluginError(f"docs/api.md does not show {', '.join(missing)}: does each have a docstring?")
    return html


def options_markdown(options: type) -> str:
    """A section for each field of the dataclass: its default, its values and its meaning."""
    hints = typing.get_type_hints(options)
    sections = []
    for field in dataclasses.fields(options):
        if not field.metadata.get("help"):
            raise PluginError(f"{options.__name__}.{field.name} has no help: write its meaning into the field's metadata")
        facts = [f"default `{field.default!r}`"]
        if choices := _choices(field, hints[field.name]):
            facts.append("one of " + ", ".join(f"`{choice!r}`" for choice in choices))
        meaning = " ".join(field.metadata["help"].split())
        sections.append(f"### `{field.name}` {{ #{field.name} }}\n\n*{'; '.join(facts)}*\n\n{meaning}\n")
    return "\n".join(sections)


def check_methods(markdown: str, methods: Mapping[str, Any]) -> None:
    """Raise PluginError unless the page names every method, and its table has the row that the class states."""
    for name, method in methods.items():
        if f"`{name}`" not in markdown:
            raise PluginError(f"docs/methods.md does not name {name}: describe every method of fedrot.METHODS there")
        row = "| " + " | ".join([f"`{name}`", method.up, method.down, method.cost, method.exact]) + " |"
        if not method.ablation and row not in markdown:
            raise PluginError(f"docs/methods.md has another row for {name} than its class; write: {row}")


def public_names(file: Path) -> list[str]:
    """The ``__all__`` of a module, read without importing it."""
    for statement in ast.parse(file.read_text("utf-8")).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(statement.value))  # type: ignore[attr-defined]
    raise PluginError(f"{file} has no __all__, which says what is public")


def _choices(field: dataclasses.Field[Any], hint: Any) -> list[Any]:
    """The values that a field may have, where they can be listed."""
    if field.metadata.get("choices"):
        return [*field.metadata["choices"]]
    if typing.get_origin(hint) is typing.Literal:
        return [*typing.get_args(hint)]
    return []


def _fedrot() -> Any:
    """The package of this checkout, whether or not it is installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import fedrot

    return fedrot

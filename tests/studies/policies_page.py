"""The tables of docs/policies.md, printed from the registry: `python -m tests.studies.policies_page`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from sodaprof.compiler.knobs import values_of
from sodaprof.compiler.policies import POLICIES


def table(*rows: Iterable[str]) -> str:
    """Returns a Markdown table; the first row is its head."""
    head, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *others))


def policies_table() -> str:
    """Returns the table of policies, what happens between full steps and the tables that they read."""
    rows = [(f"`{name}`", policy.help, policy.reads) for name, policy in POLICIES.items()]
    return table(("policy", "between full steps", "tables it reads"), *rows)


def knobs_table(policy: str) -> str:
    """Returns the table of a policy's knobs."""
    knobs = POLICIES[policy].knobs
    defaults = {one.name: "as released" if one.default is None else str(one.default) for one in fields(knobs)}
    rows = [(f"`{name}`", defaults[name], v.help, str(v)) for name, v in values_of(knobs).items()]
    return table(("knob", "default", "meaning", "values"), *rows)


if __name__ == "__main__":
    print(policies_table())
    for name in POLICIES:
        print(f"\n## `{name}`\n\n{knobs_table(name)}")

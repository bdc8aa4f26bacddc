"""Dense arrays from the rows of a profile's tables; a row too few, too many or out of place is a FormatError.

Tables are columns by name, as `profiles.read_table` returns them; `where` is what a message names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import FormatError
from .sites import Model, Transformer

Columns = dict[str, np.ndarray]
STACK_FORMS = ("output", "drift")  # what the last block hands on; that less what the first block is given


def stale_errors(
    table: Columns,
    value: str,
    keep: np.ndarray,
    model: Model,
    steps: int,
    ages: int,
    rates: np.ndarray | None,
    where: Path,
) -> dict[str, np.ndarray]:
    """Returns per transformer a column of the kept rows as [T, S, ages + 1] or [T, S, ages + 1, rates].

    NaN where there is no such past.
    """
    dense = {}
    for name, transformer in model.transformers.items():
        mine = keep & (table["transformer"] == name)
        site = site_numbers(table, mine, transformer, where)
        step, age = table["step"][mine].astype(int), table["age"][mine].astype(int)
        shape: tuple[int, ...] = (steps, len(transformer.sites), ages + 1)
        index: tuple[np.ndarray, ...] = (step, site, age)
        if rates is not None:
            shape += (len(rates),)
            index += (np.searchsorted(rates, table["prune_rate"][mine]),)
        if len(step) and not all(((i >= 0) & (i < n)).all() for i, n in zip(index, shape, strict=True)):
            raise FormatError(f"{where}: a table has steps or ages outside the profile. Profile again.")
        array = np.full(shape, np.nan)
        array[index] = table[value][mine]
        past = np.array(transformer.past(steps))
        for a in range(1, ages + 1):
            if np.isnan(array[past >= a, :, a]).any():
                raise FormatError(f"{where}: rows are missing at age {a}. Profile again with --force.")
        dense[name] = array
    return dense


def state_products(table: Columns, steps: int, where: Path) -> np.ndarray:
    """Returns the rows of kind `state` as [2T + 1, 2T + 1]."""
    return _square(table, table["kind"] == "state", np.arange(2 * steps + 1), where)


def response(table: Columns, steps: int, where: Path) -> np.ndarray | None:
    """Returns what the rows of kind `response` are of those of kind `away`, [T]; None where there are none.

    Interpolated between the steps at which they were measured, constant before the first and after the last.
    """
    found = []
    for kind in ("away", "response"):
        rows = np.flatnonzero(table["kind"] == kind)
        if not len(rows):
            return None
        found.append(dict(zip(table["row"][rows].tolist(), table["product"][rows].tolist(), strict=True)))
    away, moved = found
    if away.keys() != moved.keys() or not away.keys() <= set(range(steps)):
        raise FormatError(f"{where}: rows of kind away or response are missing. Profile again with --force.")
    known = sorted(step for step, energy in away.items() if energy > 0)  # at step 0 nothing has moved yet
    if not known:
        return np.zeros(steps)
    return np.interp(np.arange(steps), known, [moved[step] / away[step] for step in known])


def site_products(table: Columns, model: Model, steps: int, history: int, where: Path) -> dict[str, np.ndarray]:
    """Returns per transformer the rows of kind `site` as [S, T, T], NaN between steps of two turns or beyond `history`."""
    found = {}
    for name, transformer in model.transformers.items():
        rows = np.flatnonzero((table["kind"] == "site") & (table["transformer"] == name))
        site, past = site_numbers(table, rows, transformer, where), np.minimum(transformer.past(steps), history)
        found[name] = np.stack([_square(table, rows[site == i], past, where) for i in range(len(transformer.sites))])
    return found


def stack_products(
    table: Columns, model: Model, steps: int, history: int, where: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Returns per transformer that has such rows those of kind `output` and `drift`, each as [T, T] like a site's."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, transformer in model.transformers.items():
        past = np.minimum(transformer.past(steps), history)
        kept = {form: (table["kind"] == form) & (table["transformer"] == name) for form in STACK_FORMS}
        if any(keep.any() for keep in kept.values()):
            found[name] = {form: _square(table, keep, past, where) for form, keep in kept.items()}
    return found


def site_numbers(table: Columns, rows: np.ndarray, transformer: Transformer, where: Path) -> np.ndarray:
    """Returns which of the transformer's sites each of these rows (a mask, or numbers) is of."""
    order = {(s.stack, s.layer, s.module, s.call): i for i, s in enumerate(transformer.sites)}
    places = zip(*(table[c][rows] for c in ("stack", "layer", "module", "call")), strict=True)
    try:
        return np.array([order[place] for place in places], dtype=int)
    except KeyError as error:
        raise FormatError(
            f"{where}: a table names the site {error}, model.json does not. Profile again with --force."
        ) from None


def _square(table: Columns, rows: np.ndarray, past: np.ndarray, where: Path) -> np.ndarray:
    """Returns the symmetric matrix of these rows; past: how many columns before its diagonal each row has, −1 for none at all."""
    row, column = (table[c][rows].astype(int) for c in ("row", "column"))
    size = len(past)
    age = np.arange(size)[:, None] - np.arange(size)  # of (row, column)
    wanted = (age >= 0) & (age <= past[:, None])
    if not (((row >= 0) & (row < size) & (column >= 0) & (column < size)).all() and wanted[row, column].all()):
        raise FormatError(f"{where}: products of steps that the profile has none of. Profile again with --force.")
    array = np.full((size, size), np.nan)
    array[row, column] = array[column, row] = table["product"][rows]
    if len(row) != wanted.sum() or np.isnan(array[wanted]).any():
        raise FormatError(f"{where}: products are missing, or there twice. Profile again with --force.")
    return array

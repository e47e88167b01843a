"""Rows as Arrow tables, and how many bytes each of them takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hf_pretrain_ext.values import reason, shown

__all__ = ["row_bytes", "to_table"]


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> pa.Table:
    """Rows (lists, NumPy arrays, tensors, numbers, text by column) as a table.

    Args:
        rows (`Sequence[Mapping]`): at least one; all with the same columns.
        schema (`pyarrow.Schema`, *optional*): columns and types that they must have; read off the rows if None.

    Raises:
        `ValueError`: a column too many, too few, or of values of another type; the message names it.

    Example:

    >>> to_table([{"input_ids": [1, 2]}, {"input_ids": np.array([3])}])["input_ids"].to_pylist()
    [[1, 2], [3]]
    """
    names = list(rows[0]) if schema is None else schema.names
    for row in rows:
        if set(row) != set(names):
            raise ValueError(f"a row has the columns {sorted(map(str, row))}, others have {sorted(names)}")
    columns = []
    for number, name in enumerate(names):
        kind = None if schema is None else schema.types[number]
        try:
            made = pa.array([_plain(row[name]) for row in rows])
            # Not `type=kind` above, which makes 1 of 1.5 and says nothing.
            made = made if kind is None else made.cast(kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"column {name!r} holds values that cannot be kept as {kind or 'one Arrow type'}, such as "
                f"{shown(rows[0][name])} ({reason(error, 200)})"
            ) from error
        columns.append(made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made)
    if schema is not None:
        return pa.Table.from_arrays(columns, schema=schema)
    return pa.Table.from_arrays(columns, names=names)


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    # Arrow takes vectors as they are, matrices only as lists.
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim != 1 else value


def row_bytes(table: pa.Table) -> NDArray[np.int64]:
    """Bytes of the values of each row: widths of their types, and 4 for each list or text.

    Bitmaps of missing values and what files hold besides are left out.

    Example:

    >>> row_bytes(pa.table({"input_ids": pa.array([[1, 2], [3]], pa.list_(pa.int32())), "text": ["a", "bc"]})).tolist()
    [17, 14]
    """
    total = np.zeros(table.num_rows, dtype=np.int64)
    for name in table.column_names:
        chunks = table[name].chunks
        total += np.concatenate([np.zeros(0, np.int64), *(_value_bytes(chunk, name) for chunk in chunks)])
    return total


def _width(kind: pa.DataType) -> int | None:
    if pa.types.is_null(kind):
        return 0
    if pa.types.is_boolean(kind):
        return 1
    return kind.bit_width // 8 if pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind) else None


def _value_bytes(values: pa.Array, name: str) -> NDArray[np.int64]:
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    width = _width(kind)
    if width is not None:
        return np.full(len(values), width, dtype=np.int64)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        ends, each = values.offsets.to_numpy().astype(np.int64), _width(kind.value_type)
        return 4 + (np.diff(_sums(values.values, name)[ends]) if each is None else np.diff(ends) * each)
    if pa.types.is_fixed_size_list(kind):
        ends = (values.offset + np.arange(len(values) + 1)) * kind.list_size
        return np.diff(_sums(values.values, name)[ends])
    if pa.types.is_struct(kind):
        return np.sum([_value_bytes(field, name) for field in values.flatten()], axis=0, dtype=np.int64)
    if pa.types.is_dictionary(kind):
        return _value_bytes(values.dictionary_decode(), name)
    try:
        return 4 + pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"column {name!r} is of type {kind}, which a replay buffer cannot keep") from error


def _sums(values: pa.Array, name: str) -> NDArray[np.int64]:
    """Bytes of the first n values, for every n."""
    return np.concatenate([[0], np.cumsum(_value_bytes(values, name))])

"""MMBench's CircularEval (arXiv 2307.06281): a question is asked once for every rotation of its options.

The rotated rows are in the file. An item whose rows are not all there would be easier than the others, so it is an
error, never judged on what is there.
"""

from collections.abc import Sequence

from unihetero_jax.data.question_files import Question

NUM_NAMED = 5
"""Items named in a message or a result; all are counted."""


def group_rotations(path: str, questions: Sequence[Question]) -> dict[str, list[Question]]:
    """The rows of each item, the unrotated one first, by its index.

    Rows of one item have the options of the first in cyclically shifted order, each shift once, and the same right
    answer. Which way they shift is left to the file.

    Raises:
        ValueError: an item's rotations are not all there, or do not belong together; says which and what is missing.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.original_index or question.index, []).append(question)
    faults = [f"item {base}: {fault}" for base, rows in groups.items() if (fault := _fault(base, rows))]
    if faults:
        more = f" and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else ""
        raise ValueError(
            f"{path}: {len(faults)} of {len(groups)} items cannot be judged by all rotations of their options: "
            f"{'; '.join(faults[:NUM_NAMED])}{more}. Complete the file, or score each row for itself "
            "(--benchmark=mmbench-vanilla)"
        )
    return {base: sorted(rows, key=lambda row: row.original_index != "") for base, rows in groups.items()}


def _fault(base: str, rows: Sequence[Question]) -> str:
    first = next((row for row in rows if row.index == base), None)
    if first is None:
        return f"rows {', '.join(row.index for row in rows)} repeat it, and it is not there itself"
    count = len(first.options)
    shifted = [first.options[shift:] + first.options[:shift] for shift in range(count)]
    for row in rows:
        if row.options not in shifted:
            return f"row {row.index} does not have its options in rotated order"
        if _answer(row) != _answer(first):
            return f"row {row.index} has another right answer ({_answer(row)!r}, not {_answer(first)!r})"
    if {row.options for row in rows} != set(shifted) or len(rows) != count:
        return f"{len(rows)} of {count} rotations are there (rows {', '.join(row.index for row in rows)})"
    return ""


def _answer(row: Question) -> str:
    assert row.answer is not None
    return row.options[row.answer]

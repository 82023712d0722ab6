"""Lists of class names, and how two of them differ."""

from collections.abc import Sequence


def tell_apart(classes: Sequence[str], others: Sequence[str]) -> str:
    """For a message: which classes of `others` are lacking in `classes`, and which it has besides."""
    lacking = _name_first([name for name in others if name not in set(classes)])
    besides = _name_first([name for name in classes if name not in set(others)])
    if lacking and besides:
        return f"it lacks {lacking}, and has {besides} besides"
    if lacking or besides:
        return f"it lacks {lacking}" if lacking else f"it has {besides} besides"
    return "the same names in another order"


def _name_first(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"'{names[0]}'" + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")

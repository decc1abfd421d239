# SPDX-License-Identifier: Apache-2.0
"""Numbers for people."""


def plural(count: int, noun: str) -> str:
    """With its number."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def in_bytes(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def in_time(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    if days >= 2 / 24:
        return f"{24 * days:.1f} hours"
    return f"{24 * 60 * days:.0f} minutes" if days >= 2 / 24 / 60 else f"{86400 * days:.1f} seconds"


def in_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

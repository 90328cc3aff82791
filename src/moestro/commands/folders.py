"""Names of the folders that commands write to unless `--out` names one."""

import hashlib


def slug(recipes: tuple[str, ...] | list[str]) -> str:
    """Return a folder name made of recipe specs, in at most 160 bytes."""
    name = "-vs-".join("".join(c if c.isalnum() or c in "+-=.," else "_" for c in spec) for spec in recipes)
    if len(name.encode()) <= 160:
        return name
    return f"{name[:40]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"  # a file name may have 255 bytes

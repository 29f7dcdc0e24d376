"""Seeds that depend on what a thing is, never on when or where it is made."""

import hashlib


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from any sequence of numbers and strings.

    The same parts give the same seed on every machine and in every process, so an image does not depend on
    batch size, sharding, or the point at which a run was resumed. Our choice: the first 8 bytes of sha256.
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

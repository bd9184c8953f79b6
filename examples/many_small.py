"""A service's sessions: 50,000 small dicts, of which a fifth fits in memory.

    python examples/many_small.py
"""

from __future__ import annotations

import random

from fbcache import FBPool, MutatedError

COUNT = 50_000


def session(number: int) -> dict[str, object]:
    """Return what is known of one user."""
    return {"user": number, "name": f"user-{number}", "basket": [number % 7, number % 11], "visits": 1}


def main() -> None:
    """Put them all, visit some, and see where they are."""
    rng = random.Random(1)
    with FBPool("8MB") as pool:
        for number in range(COUNT):
            pool.put(number, session(number))
        for _ in range(5_000):
            with pool.get_mut(rng.randrange(COUNT)) as user:
                user["visits"] += 1
        pool.drain()
        stats = pool.stats()
        visits = 0
        for number in range(COUNT):
            with pool.get(number) as user:
                visits += user["visits"]
    print(f"{COUNT:,} sessions, {visits:,} visits")
    print(f"{stats.resident_bytes / 1e6:.0f} MB in memory, {stats.spilled_bytes / 1e6:.0f} MB not")
    assert visits == COUNT + 5_000
    assert stats.resident_bytes <= 8_000_000

    # A dict cannot be made read-only. While you develop, let the pool tell who forgets get_mut.
    with FBPool("8MB", debug=True) as pool:
        pool.put("me", session(0))
        try:
            with pool.get("me") as user:
                user["visits"] += 1
        except MutatedError as error:
            print(f"MutatedError: {str(error).partition(',')[0]} ...")


if __name__ == "__main__":
    main()

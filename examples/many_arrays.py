"""Keep more arrays than fit, go through them, and see what the pool has done."""

import numpy as np

from fbcache import FBPool

DAYS = 60
PER_DAY = 250_000


def main() -> None:
    """Store 120 MB within 24, and find the warmest day."""
    with FBPool("24MB") as pool:
        for day in range(DAYS):
            season = 10 * np.sin(day / DAYS * np.pi)
            pool.put(("day", day), np.random.default_rng(day).normal(season, 3, PER_DAY))

        means = {}
        for name in pool:
            with pool.get(name) as values:
                means[name] = values.mean()
        warmest = max(means, key=means.__getitem__)

        with pool.get_mut(warmest) as values:
            np.clip(values, -5, 15, out=values)
        print(f"{warmest} is the warmest of {len(pool)}; cut, it is {pool[warmest].mean():.2f} degrees")

        stats = pool.stats()
        print(f"in memory: {stats.resident_bytes:,} bytes of {stats.budget:,}")
        print(f"on disk:   {stats.disk_bytes:,} bytes; {stats.spills} writes, {stats.loads} reads")


if __name__ == "__main__":
    main()

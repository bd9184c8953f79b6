"""Many tasks share a pool: readers side by side, one writer at a time, and the loop never blocked."""

import asyncio

import numpy as np

from fbcache import FBPool

TABLES = 40


async def look_up(pool: FBPool, table: int, row: int) -> float:
    """Read one row."""
    async with pool.get(table) as values:
        return float(values[row].sum())


async def count(pool: FBPool, table: int) -> None:
    """Add one everywhere, alone."""
    async with pool.get_mut(table) as values:
        values += 1


async def main() -> None:
    """Serve 400 reads and 400 writes of 40 tables, of which 10 fit."""
    with FBPool("8MB") as pool:
        for table in range(TABLES):
            await asyncio.to_thread(pool.put, table, np.zeros((1000, 100)))
        async with asyncio.TaskGroup() as tasks:
            for i in range(400):
                tasks.create_task(look_up(pool, i % TABLES, i))
                tasks.create_task(count(pool, (i * 7) % TABLES))
        sums = [await look_up(pool, table, 0) for table in range(TABLES)]
        print(f"each table was changed {400 // TABLES} times: {set(sums)}")


if __name__ == "__main__":
    asyncio.run(main())

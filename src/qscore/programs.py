"""Compiled programs, kept for the next seed or run that asks for the same one."""

from functools import lru_cache

KEPT = 8
"""Programs of each kind that are kept.

A program of this package holds some hundreds of memory mappings; Linux grants a process 65,530
(`vm.max_map_count`), and XLA ends the process where it is refused one. A process that trains one
configuration after another must therefore let go of the programs it has done with.
"""

kept = lru_cache(maxsize=KEPT)
"""Decorator: the results of the last `KEPT` calls with other arguments are returned again."""

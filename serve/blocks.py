"""Which pages of the KV cache are free: a free list over integers 0..num_pages-1.

Guarantees that a page has at most one holder and that nothing is returned twice. Knows nothing of sequences or arrays.
"""

from collections.abc import Iterable


class PageAllocator:
    """A stack of free page ids; the pages given back last are handed out first (they are warm in the cache)."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._held = bytearray(num_pages)

    @property
    def free(self) -> int:
        """Number of pages nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; ValueError (and nothing taken) if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free of {self.num_pages}")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._held[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; ValueError on a page that is not held."""
        for page in pages:
            if not self._held[page]:
                raise ValueError(f"page {page} is returned but not held")
            self._held[page] = 0
            self._free.append(page)

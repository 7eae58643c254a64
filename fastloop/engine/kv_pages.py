"""Books of the KV pool's pages: who holds which page. Pure Python: no tensors, no device.

A page is free, or held with a reference count. A *lease* is one session's right to pages: its quota is
promised, so a session admitted with a quota can never find the pool empty, whatever others do. Pages
shared by many sessions (the prefix of one prompt) are allocated once, outside any lease, and counted.

    invariant:  free pages >= sum over leases of (quota - held)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..errors import CapacityError


class PageAllocator:
    """Reference-counted pages 0..pages-1."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # a stack: the page freed last is reused first
        self._references = [0] * pages
        self._leases: set[Lease] = set()
        self.promised = 0  # pages promised to leases and not yet taken

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    @property
    def available(self) -> int:
        """Free pages that no lease was promised."""
        return len(self._free) - self.promised

    def allocate(self, count: int, what: str = "pages") -> list[int]:
        """Take `count` unpromised pages with one reference each, or CapacityError (taking none)."""
        if count > self.available:
            raise CapacityError(
                f"KV pool exhausted: {what} needs {count} pages, {self.available} of {self.pages} are "
                f"available ({self.used} in use, {self.promised} promised to open sessions). Close a "
                "session, shorten window_s, or open the engine with more kv_pages."
            )
        return self._take(count)

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """One reference less to each page; returns those that became free."""
        freed = []
        for page in pages:
            assert self._references[page] > 0, f"page {page} was released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                freed.append(page)
        self._free.extend(freed)
        return freed

    def lease(self, quota: int, what: str = "session") -> Lease:
        """Promise `quota` pages to one holder, or CapacityError. Quota 0 promises nothing."""
        if quota > self.available:
            raise CapacityError(
                f"KV pool exhausted: {what} needs up to {quota} pages, {self.available} of {self.pages} can "
                f"be promised ({self.used} in use, {self.promised} promised to open sessions). Close a "
                "session, shorten window_s, or open the engine with more kv_pages."
            )
        lease = Lease(self, quota, what)
        self._leases.add(lease)
        self.promised += quota
        return lease

    def check(self, shared: Iterable[Sequence[int]] = ()) -> None:
        """Compare the books with what the holders say; AssertionError names the first difference.

        shared: for each holder of pages outside leases, its pages.
        """
        counts: Counter[int] = Counter()
        for lease in self._leases:
            counts.update(lease.held)
        for pages in shared:
            counts.update(pages)
        for page, references in enumerate(self._references):
            assert counts[page] == references, f"page {page}: {references} references, {counts[page]} holders"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert free == {p for p, r in enumerate(self._references) if r == 0}, "the free list is wrong"
        promised = sum(lease.outstanding for lease in self._leases)
        assert promised == self.promised, f"{self.promised} pages promised, leases say {promised}"
        assert self.free >= self.promised, f"{self.promised} pages promised, only {self.free} free"

    def _take(self, count: int) -> list[int]:
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages


class Lease:
    """The pages of one session; within its quota, `take` cannot fail."""

    def __init__(self, allocator: PageAllocator, quota: int, what: str) -> None:
        self._allocator = allocator
        self.quota = quota
        self.what = what
        self.held: list[int] = []

    @property
    def outstanding(self) -> int:
        """Promised pages not yet taken."""
        return max(0, self.quota - len(self.held))

    def take(self, count: int) -> list[int]:
        """`count` pages: promised ones first, beyond the quota from what is available (CapacityError)."""
        promised = min(count, self.outstanding)
        beyond = count - promised
        if beyond > self._allocator.available:
            self._allocator.allocate(beyond, self.what)  # raises with the whole story
        pages = self._allocator._take(count)
        self._allocator.promised -= promised
        self.held.extend(pages)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Return pages; the promise for them stands again."""
        before = self.outstanding
        gone = set(pages)
        self.held = [page for page in self.held if page not in gone]
        self._allocator.release(pages)
        self._allocator.promised += self.outstanding - before

    def close(self) -> None:
        """Return everything and give up the promise. Idempotent."""
        if self not in self._allocator._leases:
            return
        self.give_back(list(self.held))
        self._allocator.promised -= self.outstanding
        self._allocator._leases.discard(self)

"""The page books: any sequence of operations leaves them balanced. No torch, no device."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastloop.engine.kv_pages import Lease, PageAllocator
from fastloop.errors import CapacityError

PAGES = 24


class Books(RuleBasedStateMachine):
    """Random leases, takes, returns, shared prefixes; a model of who holds what on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.leases: list[Lease] = []
        self.shared: list[list[int]] = []  # one entry per holder

    @rule(quota=st.integers(0, PAGES + 2))
    def lease(self, quota: int) -> None:
        fits = quota <= self.allocator.available
        try:
            self.leases.append(self.allocator.lease(quota, "test"))
        except CapacityError:
            assert not fits
        else:
            assert fits

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99), count=st.integers(0, PAGES))
    def take(self, which: int, count: int) -> None:
        lease = self.leases[which % len(self.leases)]
        fits = count - lease.outstanding <= self.allocator.available
        before = list(lease.held)
        try:
            pages = lease.take(count)
        except CapacityError:
            assert not fits, "a promised page was refused"
            assert lease.held == before, "a refused take changed the lease"
        else:
            assert fits and len(set(pages)) == count
            assert not set(pages) & set(before)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99), count=st.integers(0, PAGES))
    def give_back(self, which: int, count: int) -> None:
        lease = self.leases[which % len(self.leases)]
        lease.give_back(lease.held[:count])

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        lease = self.leases.pop(which % len(self.leases))
        lease.close()
        lease.close()  # idempotent

    @rule(count=st.integers(1, 4))
    def share_new(self, count: int) -> None:
        try:
            self.shared.append(self.allocator.allocate(count, "prefix"))
        except CapacityError:
            assert count > self.allocator.available

    @precondition(lambda self: self.shared)
    @rule(which=st.integers(0, 99))
    def share_more(self, which: int) -> None:
        pages = self.shared[which % len(self.shared)]
        self.allocator.retain(pages)
        self.shared.append(pages)

    @precondition(lambda self: self.shared)
    @rule(which=st.integers(0, 99))
    def unshare(self, which: int) -> None:
        pages = self.shared.pop(which % len(self.shared))
        freed = self.allocator.release(pages)
        assert bool(freed) == (pages not in self.shared)

    @invariant()
    def balanced(self) -> None:
        self.allocator.check(self.shared)

    def teardown(self) -> None:
        for lease in self.leases:
            lease.close()
        for pages in self.shared:
            self.allocator.release(pages)
        self.allocator.check()
        assert self.allocator.free == PAGES and self.allocator.promised == 0


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40)


def test_messages_say_what_is_missing_and_what_to_do() -> None:
    allocator = PageAllocator(4)
    allocator.lease(3, "session 7")
    with pytest.raises(CapacityError, match=r"session 8 needs up to 2 pages, 1 of 4 .* kv_pages"):
        allocator.lease(2, "session 8")
    with pytest.raises(CapacityError, match=r"the prefix needs 2 pages"):
        allocator.allocate(2, "the prefix")


def test_check_finds_a_lost_page() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(1)
    with pytest.raises(AssertionError, match="1 references, 0 holders"):
        allocator.check()


def test_double_release_is_caught() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(pages)

"""The paged KV cache: pages of keys and values, and the sequence of one session over them.

    prefix pages (shared by all sessions of a prompt)   stream pages (the session's own)
    [p p p p p p . .]                                   [. . . s s s s s] [s s s . . . . .]
     positions 0..5 + dropped                                  ^ start           ^ end

Stream token i keeps RoPE position prefix_len + i for ever; when old units are dropped, the prefix is
rotated forward instead (see fastloop.window), into private pages of the session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..ops.rope_append import rotate
from .kv_layout import KVLayout, RowLayout
from .kv_pages import Lease, PageAllocator


def pages_for(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)


class KVCache:
    """The pool: k_pages, v_pages [L, P, ...], rows [L, P, Q, G, K] unless a layout is given, and its books.

    order: runs work on the pages, given with its name, in order with the steps (Runner.prepare).
    """

    def __init__(
        self,
        model: ModelConfig,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        layout: KVLayout | None = None,
    ) -> None:
        self.layout = layout or RowLayout(dtype)
        self.k_pages, self.v_pages = (
            self.layout.pool(model.decoder, pages, page_tokens, device) for _ in range(2)
        )
        self.page_tokens = page_tokens
        self.order: Callable[[str, Callable[[], None]], None] = lambda name, work: work()
        self.allocator = PageAllocator(pages)

    @property
    def pages(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the decoder reads and writes: k_pages, v_pages, and the scales of float8 ones."""
        return self.k_pages, self.v_pages, self.layout.kv_scale

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return 2 * self.k_pages[:, 0].numel() * self.k_pages.element_size()

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        for pool in (_plain(self.k_pages), _plain(self.v_pages)):
            pool[:, target] = pool[:, source]

    def rows(self, pages: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of some pages, [L, n, Q, G, K] each."""
        return self.layout.keys(self.k_pages[:, pages]), self.layout.values(self.v_pages[:, pages])

    def put_keys(self, pages: list[int], rows: Tensor) -> None:
        _plain(self.k_pages)[:, pages] = _plain(self.layout.of_keys(rows))

    def put_values(self, pages: list[int], rows: Tensor) -> None:
        _plain(self.v_pages)[:, pages] = _plain(self.layout.of_values(rows))


def _plain(pages: Tensor) -> Tensor:
    """Pages as torch can write to some of them: float8 as bytes."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


@dataclass
class KVSequence:
    """One session's tokens: `prefix_len` pinned ones, then stream tokens start..end-1 (absolute indices)."""

    cache: KVCache
    lease: Lease
    prefix_pages: list[int]  # pristine, shared; positions 0..prefix_len-1
    prefix_len: int
    private_prefix: list[int] = field(default_factory=list)  # rotated copy, once something was dropped
    pages: list[int] = field(default_factory=list)  # of the stream, in order
    start: int = 0
    end: int = 0

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def first_page_index(self) -> int:
        return self.start // self.cache.page_tokens

    @property
    def table(self) -> list[int]:
        """All pages in slot order: one row of the block table."""
        return (self.private_prefix or self.prefix_pages) + self.pages

    @property
    def gap(self) -> tuple[int, int]:
        """Slots [start, end) between the prefix's last token and the first kept stream token."""
        prefix_slots = len(self.prefix_pages) * self.cache.page_tokens
        return self.prefix_len, prefix_slots + self.start % self.cache.page_tokens

    @property
    def kv_len(self) -> int:
        """Slots in use, gap included."""
        page = self.cache.page_tokens
        return len(self.prefix_pages) * page + self.end - self.first_page_index * page

    @property
    def position(self) -> int:
        """RoPE position of the next stream token."""
        return self.prefix_len + self.end

    def extend(self, count: int) -> np.ndarray:
        """Append `count` tokens: their pool slots int64 [count]. CapacityError leaves all as it was."""
        page = self.cache.page_tokens
        needed = pages_for(self.end + count, page) - self.first_page_index - len(self.pages)
        if needed > 0:
            self.pages += self.lease.take(needed)
        index = np.arange(self.end, self.end + count) - self.first_page_index * page
        self.end += count
        return np.asarray(self.pages, dtype=np.int64)[index // page] * page + index % page

    def truncate(self, end: int) -> None:
        """Forget the tokens from absolute index `end` on."""
        assert self.start <= end <= self.end, f"cannot truncate [{self.start}, {self.end}) to {end}"
        self.end = end
        keep = max(0, pages_for(end, self.cache.page_tokens) - self.first_page_index)
        self._give_back(self.pages[keep:])
        del self.pages[keep:]

    def drop(self, count: int, inv_freq: Tensor) -> None:
        """Forget the oldest `count` stream tokens and move the prefix `count` positions forward."""
        assert 0 < count <= self.tokens, f"cannot drop {count} of {self.tokens}"
        whole = (self.start + count) // self.cache.page_tokens - self.first_page_index
        self.start += count
        self._give_back(self.pages[:whole])
        del self.pages[:whole]
        fresh = not self.private_prefix
        if fresh:
            self.private_prefix = self.lease.take(len(self.prefix_pages))
        move = self._prefix_move(inv_freq, fresh)
        self.cache.order("rotate", move)

    def _prefix_move(self, inv_freq: Tensor, fresh: bool) -> Callable[[], None]:
        """private prefix <- pristine prefix, its keys rotated to positions start + 0..prefix_len-1.

        fresh: the values are not there yet. What this object holds now counts, whenever the move is made.
        """
        cache, start, source, target = self.cache, self.start, self.prefix_pages, self.private_prefix

        def move() -> None:
            if fresh:
                cache.copy_pages(source, target)
            pristine, _ = cache.rows(source)  # [L, pages, Q, G, K]
            shift = torch.full((1,), start, device=pristine.device)
            width = pristine.shape[-1]
            rotated = rotate(pristine.reshape(1, -1, width), shift, inv_freq).view_as(pristine)
            cache.put_keys(target, rotated)

        return move

    def check(self) -> None:
        """The lease holds the pages of this sequence and no other; AssertionError where they differ."""
        own = [*self.private_prefix, *self.pages]
        assert sorted(own) == sorted(self.lease.held), (
            f"{self.lease.what} uses {own}, holds {self.lease.held}"
        )
        needed = pages_for(self.end, self.cache.page_tokens) - self.first_page_index
        assert len(self.pages) == needed, f"{self.lease.what} has {len(self.pages)} pages, needs {needed}"

    def _give_back(self, pages: list[int]) -> None:
        if pages:
            self.lease.give_back(pages)

    def export(self) -> tuple[Tensor, Tensor]:
        """Copies of the stream's keys and values [L, tokens, G, K]."""
        page = self.cache.page_tokens
        low, high = self.start % page, self.start % page + self.tokens
        keys, values = (rows.flatten(1, 2)[:, low:high].clone() for rows in self.cache.rows(self.pages))
        return keys, values

    def load(self, keys: Tensor, values: Tensor, start: int, inv_freq: Tensor) -> None:
        """Fill an empty sequence with exported keys and values whose first token is number `start`."""
        assert not self.pages and self.end == 0, "load needs an empty sequence"
        count = keys.shape[1]
        self.start = self.end = start
        self.extend(count)
        low, puts = start % self.cache.page_tokens, (self.cache.put_keys, self.cache.put_values)
        for content, old, put in zip((keys, values), self.cache.rows(self.pages), puts, strict=True):
            old.flatten(1, 2)[:, low : low + count] = content.to(old)
            put(self.pages, old)
        if start:
            self.private_prefix = self.lease.take(len(self.prefix_pages))
            self._prefix_move(inv_freq, fresh=True)()

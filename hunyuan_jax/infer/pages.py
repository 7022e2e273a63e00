"""Who owns which page of the cache, and which pages hold what a prompt may share.

A page whose tokens are all computed is named by the hash of them and of everything before them, so
that a prompt finds its longest known beginning page by page.  Imports no jax.
"""

import array
import collections
import hashlib
from collections.abc import Iterable, Sequence


def page_hashes(
    tokens: Sequence[int], page_size: int, salt: str, known: Sequence[bytes] = ()
) -> list[bytes]:
    """The names of the pages that the tokens fill, each made of all tokens up to its end; `known`:
    the first of them.
    """
    names = list(known)
    name = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    name = names[-1] if names else name
    ids = array.array("i", tokens[len(names) * page_size :])
    for end in range(page_size, len(ids) + 1, page_size):
        page = ids[end - page_size : end].tobytes()
        name = hashlib.blake2b(name + page, digest_size=16).digest()
        names.append(name)
    return names


class Pages:
    """The pages 1 to num_pages of one pool; page 0 is for what need not be kept.

    A page is in use (by one row or several), cached (nobody uses it, its contents may be shared)
    or free.  The page that went unused longest is the first to lose its contents.
    """

    def __init__(self, num_pages: int):
        self.num_total = num_pages
        self._num_users = [0] * (num_pages + 1)
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._free = collections.deque(range(1, num_pages + 1))
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._leaving: collections.deque[tuple[int, list[int]]] = collections.deque()

    @property
    def num_available(self) -> int:
        """Pages that can be taken now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Unused pages with contents that may be shared."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages in use, with those that wait in `release`."""
        return sum(num > 0 for num in self._num_users)

    @property
    def unused(self) -> list[int]:
        """The pages that can be taken now, and page 0."""
        return [page for page, num in enumerate(self._num_users) if not num]

    @property
    def has_leaving(self) -> bool:
        """Whether pages wait in `release`."""
        return bool(self._leaving)

    def take(self, num: int) -> list[int] | None:
        """Pages for one row to write into, or None if there are not enough."""
        if num > self.num_available:
            return None
        taken = []
        for _ in range(num):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._name_of.pop(page)]
            self._num_users[page] = 1
            taken.append(page)
        return taken

    def num_known(self, names: Sequence[bytes]) -> int:
        """How many of the first names have a page."""
        return next((i for i, name in enumerate(names) if name not in self._page_of), len(names))

    def num_unused(self, names: Iterable[bytes]) -> int:
        """How many of the pages of known names nobody uses: `share` makes them unavailable."""
        return sum(self._page_of[name] in self._cached for name in names)

    def share(self, names: Iterable[bytes]) -> list[int]:
        """The pages of known names, with one user more."""
        pages = [self._page_of[name] for name in names]
        for page in pages:
            self._cached.pop(page, None)
            self._num_users[page] += 1
        return pages

    def name(self, page: int, name: bytes) -> None:
        """Says that a page in use holds what `name` is the hash of, unless another does."""
        if name not in self._page_of and page not in self._name_of:
            self._name_of[page] = name
            self._page_of[name] = page

    def release(self, pages: Sequence[int], step: int) -> None:
        """Takes one user from each, once `step` has come back (`settle`): it may still write."""
        self._leaving.append((step, list(pages)))

    def forget(self) -> None:
        """Forgets the contents of pages that nobody uses.  None may be in use."""
        assert not self.num_used
        self._free.extend(self._cached)
        for known in (self._cached, self._name_of, self._page_of):
            known.clear()

    def settle(self, step: int) -> None:
        """Frees what was released for steps up to this one, which have come back."""
        while self._leaving and self._leaving[0][0] <= step:
            # The last pages of a row are the first to be taken again: fewer prompts share them.
            for page in reversed(self._leaving.popleft()[1]):
                self._num_users[page] -= 1
                if not self._num_users[page]:
                    if page in self._name_of:
                        self._cached[page] = None
                    else:
                        self._free.append(page)

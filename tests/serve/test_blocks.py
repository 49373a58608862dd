import pytest

from meshloom.serve.blocks import PageAllocator


def test_every_page_is_handed_out_once():
    pages = PageAllocator(8)
    first, second = pages.allocate(3), pages.allocate(5)
    assert sorted(first + second) == list(range(8))
    assert pages.free == 0


def test_a_refused_allocation_takes_nothing():
    pages = PageAllocator(4)
    with pytest.raises(ValueError, match="5 pages wanted, 4 free of 4"):
        pages.allocate(5)
    assert pages.free == 4


def test_a_page_cannot_be_returned_twice():
    pages = PageAllocator(4)
    held = pages.allocate(2)
    pages.release(held)
    with pytest.raises(ValueError, match="not held"):
        pages.release(held)

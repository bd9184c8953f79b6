"""Kits of tests that hold a codec or a store of anybody's to what the pool relies on.

A kit is a class of tests for pytest. Derive from it, in a class whose name starts with ``Test``, and say how
the thing is made::

    from fbcache.testing import StoreTests

    class TestMyStore(StoreTests):
        def make_store(self, directory, limits):
            return MyStore(directory, limits=limits)

Guarantees: every promise of :class:`~fbcache.codec.frames.Codec` and of
:class:`~fbcache.store.protocol.BlobStore` has a test, which says what is broken when it fails; a test
of what is optional is skipped where it is missing. pytest itself is not imported here. Tests use its fixture
``tmp_path``, and nothing else of it.
"""

from fbcache.testing.codecs import CodecTests
from fbcache.testing.stores import StoreTests

__all__ = ["CodecTests", "StoreTests"]

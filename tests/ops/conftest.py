"""`implementation`: a test that takes it runs once for every implementation of the op that its file names."""

from fastloop.testing.plugin import pytest_collection_modifyitems, pytest_generate_tests

__all__ = ["pytest_collection_modifyitems", "pytest_generate_tests"]

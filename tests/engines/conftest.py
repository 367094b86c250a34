"""The tiny models of the model tests, for the engines as well."""

from tests.model.conftest import tiny, untied

__all__ = ["tiny", "untied"]

"""One local Ray for the pages of a module, as in the integration tests."""

from tests.integration.conftest import local_ray

__all__ = ["local_ray"]

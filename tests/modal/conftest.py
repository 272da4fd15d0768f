from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.modal.local_modal import Plane
from tests.modal.service_under_test import EMBEDDED, NAMED, Deployed, fill_volume


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.modal)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Deployed]:
    """A control plane with nothing on it."""
    with Plane(tmp_path / "plane") as plane:
        yield Deployed(plane, tmp_path)


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The service with the embedded model, deployed once. Containers start when something asks for them."""
    folder = tmp_path_factory.mktemp("modal")
    with Plane(folder / "plane") as plane:
        fill_volume(plane)
        service = Deployed(plane, folder)
        service.deploy(GPU="none", MODELS=NAMED, **EMBEDDED)
        yield service

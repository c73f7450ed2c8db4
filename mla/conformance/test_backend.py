"""What `pytest --pyargs mla.conformance --mla-backend NAME` collects: each check of a subject is a test."""

from __future__ import annotations

import json

import msgspec
import pytest

from mla.conformance.plugin import PROPERTY, suite_of
from mla.conformance.pytest_suite import conclude
from mla.conformance.suite import Instance, Suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by the checks of every op and dtype of the backend."""
    config = metafunc.config
    asked = any("conformance" in word or "test_backend" in word for word in config.args)
    if not asked and getattr(config.option, "mla_backend", None) is None:
        pytest.skip("no --mla-backend was given", allow_module_level=True)  # a run over a whole checkout
    planned = suite_of(config).planned
    metafunc.parametrize("instance", planned, ids=[instance.id for instance in planned])


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    """Return the open backend with what is known of its failures."""
    return suite_of(pytestconfig)


def test_conformance(instance: Instance, suite: Suite, request: pytest.FixtureRequest) -> None:
    """The check passes, or is refused with a reason."""
    result = suite.carry_out(instance)
    recorded = json.dumps(msgspec.to_builtins(result))  # which knows infinite errors
    request.node.user_properties.append((PROPERTY, recorded))
    conclude(instance.check.description, [result], first_look=suite.subject.quick)

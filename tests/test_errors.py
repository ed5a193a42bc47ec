"""The exception tree."""

from __future__ import annotations

import pickle

import pytest

from repvgg_deploy import errors

KINDS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.RepVGGDeployError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_error_shows_message_and_remedy(kind: type[errors.RepVGGDeployError]) -> None:
    error = kind("what went wrong", remedy="do this")
    assert (error.message, error.remedy) == ("what went wrong", "do this")
    assert str(error) == "what went wrong\n  remedy: do this"


@pytest.mark.parametrize("kind", KINDS)
def test_error_sent_between_processes_arrives_whole(kind: type[errors.RepVGGDeployError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", remedy="how")))
    assert type(error) is kind
    assert (error.message, error.remedy) == ("what", "how")


@pytest.mark.parametrize("remedy", ["", "  \n"])
def test_error_without_a_remedy_is_our_own_bug(remedy: str) -> None:
    with pytest.raises(AssertionError, match="needs a remedy"):
        errors.InputError("what", remedy=remedy)


def test_error_without_the_remedy_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        errors.InputError("what")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.InputError, ValueError),
        (errors.ArtifactError, OSError),
        (errors.MissingDependencyError, ImportError),
        (errors.SimplifyError, errors.ExportError),
        (errors.ContractError, errors.ExportError),
        (errors.PlanIncompatibleError, errors.PlanError),
    ],
)
def test_error_is_caught_as_what_python_calls_it(kind: type[errors.RepVGGDeployError], base: type[Exception]) -> None:
    with pytest.raises(base):
        raise kind("what", remedy="how")

import pytest

from tests.hub import stand_in


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine; the working directory is a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    with stand_in.serving(tmp_path / "cache", monkeypatch) as hub:
        yield hub

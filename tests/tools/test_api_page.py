"""The API page: every public name, as it is called and as its docstring says."""

import importlib

from tools import api_page


def sample(self, first: int, second: str = "a", *, _own: float = 0.5) -> None:
    """One line.

    More of it.

    Args:
        first: what it is,
            over two lines.
        second: text.

    Returns:
        Nothing: at all.

    The end.
    """


def test_a_docstring_becomes_an_entry():
    assert list(api_page.entry("sample", sample)) == [
        "### `sample(first: int, second: str = 'a')`", "", "One line.", "", "More of it.", "", "*Args*", "",
        "- `first`: what it is,", "  over two lines.", "- `second`: text.", "", "*Returns*", "", "Nothing: at all.", "",
        "The end.", "",
    ]  # fmt: skip


def test_every_public_name_is_there_and_documented():
    page = api_page.render()
    for name in api_page.MODULES:
        module = importlib.import_module(name)
        for each in module.__all__:
            what = getattr(module, each)
            if callable(what):
                assert f"### `{each}" in page, each
                assert what.__doc__, each
    assert " at 0x" not in page

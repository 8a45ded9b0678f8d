"""The page at `/` in a real browser: images grow scale by scale while the pool fills."""

import re

import pytest
from small_engines import SCHEDULE, engine

from tools import browser

web = pytest.importorskip("small_servers", reason="needs what the extra `serve` installs")

CAPTIONS = "[...document.querySelectorAll('figcaption')].map(one => one.textContent)"


def grows(captions):
    """Whether one of them tells a scale; images ahead of it may be done."""
    return any(re.search(rf"scale \d of {len(SCHEDULE)}", one) for one in captions)


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_it_draws_and_shows_the_pool(monkeypatch):
    drawer, looked = engine(images=2), [False]
    step = drawer._model.step

    def slow(*arguments):  # while the page has not been looked at, the pool stands half full
        if drawer.load.ticks == 7:
            web.until(lambda: looked[0])
        step(*arguments)

    monkeypatch.setattr(drawer._model, "step", slow)
    with web.server(web.app(drawer)) as address, browser.page() as page:
        page.open(f"http://{address}/?prompt=hen&count=12&seed=3", 900, 700)
        web.until(lambda: page.ask("document.querySelectorAll('figure img[src]').length"))
        web.until(lambda: page.ask("parseFloat(document.querySelector('#pool div').style.height)") or 0)
        web.until(lambda: grows(page.ask(CAPTIONS)))  # and stays so until it has been looked at
        captions = page.ask(CAPTIONS)
        booked = page.ask("[...document.querySelectorAll('#pool div')].map(one => parseFloat(one.style.height))")
        looked[0] = True
        assert len(captions) == 12 and captions[-1] == "seed 14: waits", captions
        assert len(booked) == len(SCHEDULE) and all(0 <= height <= 100 for height in booked)
        web.until(lambda: page.ask("document.querySelectorAll('img[data-done=true]').length") == 12)
        assert page.ask("document.getElementById('model').textContent") == "– small"
        page.ask("document.forms[0].prompt.value = 'unicorn', document.forms[0].requestSubmit()")
        web.until(lambda: "it must be a class" in page.ask("document.getElementById('drawings').textContent"))

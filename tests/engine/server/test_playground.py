"""The page at /, in a real browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from browsers import CHROMIUM, Page, opened_page
from proxies import proxied
from servers import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(api_keys=("s3/+cret~",)) as server:
        yield server


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here: the playground is not tested")
    with opened_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def open_playground(page: Page, url: str) -> None:
    page.events.clear()
    page.go(url)
    page.run("settings.key.value = 's3/+cret~'; settings.key.dispatchEvent(new Event('change'))")
    page.wait("at('connection').textContent === 'connected'")


def ask(page: Page, text: str, **settings: object) -> None:
    for name, value in settings.items():
        page.run(f"settings.{name}.value = {value!r}")
    page.run(f"at('message').value = {text!r}; at('send').click()")


def last_note(page: Page) -> str:
    note: str = page.run("[...document.querySelectorAll('.note')].at(-1).textContent")
    return note


def test_it_asks_for_a_key_and_takes_no_wrong_one(server: Running, page: Page) -> None:
    page.go(server.url)
    page.wait("at('connection').textContent === 'needs an API key'")
    page.run("settings.key.value = 'wrong'; at('message').value = 'Hi'; at('send').click()")
    page.wait("document.querySelector('.note.bad')?.textContent.includes('API key')")


def test_a_conversation_streams_with_its_rates(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    assert page.run("at('model').textContent") == "random:tiny"
    ask(page, "Hello there, how are you today?", max_tokens=40, seed=5, system="Be brief.")
    page.wait("!reply && document.querySelector('.assistant .note').textContent")
    assert re.fullmatch(
        r"\d+ tokens · [\d.–]+ tokens/s · (length|stop) · seed 5 · \d+ of \d+ prompt tokens cached", last_note(page)
    )
    assert re.fullmatch(r"\d+ ms", page.run("at('first').textContent"))
    # The second prompt begins with the first conversation, which is in the cache.
    ask(page, "And tomorrow?")
    page.wait("!reply && document.querySelectorAll('.assistant').length === 2")
    assert page.run("messages.length") == 4
    assert int(page.run("at('hit').textContent").split()[0]) > 20
    server.wait_until_idle()


def test_the_cancel_button_cancels(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    ask(page, "Hi", max_tokens=7000, temperature=30)
    page.wait("reply?.tokens > 5")
    assert page.run("at('send').disabled && !at('cancel').disabled")
    page.run("at('cancel').click()")
    page.wait("!reply")
    assert " · cancelled · " in last_note(page)
    server.wait_until_idle()


def test_a_new_conversation_has_nothing_of_the_reply_that_it_breaks_off(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    ask(page, "Hi", max_tokens=7000, temperature=30)
    page.wait("reply?.tokens > 5")
    page.run("at('clear').click()")
    page.wait("!reply")
    assert page.run("messages.length") == 0
    server.wait_until_idle()


def test_leaving_the_page_cancels_too(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    ask(page, "Hi", max_tokens=7000, temperature=30)
    page.wait("reply?.tokens > 5")
    page.go("about:blank")
    server.wait_until_idle()


def test_a_reply_goes_on_after_the_connection_was_lost(server: Running, page: Page) -> None:
    with proxied(server.port) as proxy:
        open_playground(page, proxy.url)
        ask(page, "Hi", max_tokens=500, seed=7, temperature=30)
        page.wait("reply?.tokens > 5")
        proxy.cut()
        page.wait("!reply")
        assert proxy.num_connections >= 3
        assert last_note(page).startswith("500 tokens · ")
        page.go("about:blank")


def test_a_refusal_is_shown_and_the_question_can_be_asked_again(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    ask(page, "Hi", top_p=1, min_p=0.5, max_tokens=10**6)
    page.wait("document.querySelector('.note.bad')?.textContent.includes('max_tokens')")
    ask(page, "Hi", max_tokens=3)
    page.wait("!reply && messages.length === 2")


def test_nothing_comes_from_elsewhere_and_no_policy_is_broken(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    sent = [event["params"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    asked_for = [params["request"]["url"] for params in sent]
    assert asked_for
    assert all(url.startswith((server.url, "data:")) for url in asked_for)
    entries = [event["params"]["entry"]["text"] for event in page.events if event["method"] == "Log.entryAdded"]
    # The first look for the model's name, before there was a key.
    assert [text for text in entries if "401" not in text] == []
    policy = "await fetch('/', {method: 'HEAD'}).then((answer) => answer.headers.get('content-security-policy'))"
    assert "default-src 'none'" in page.run(f"(async () => {policy})()")
    assert page.run("document.querySelectorAll('[style], [onclick]').length") == 0


def test_every_control_has_a_name(server: Running, page: Page) -> None:
    open_playground(page, server.url)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("textbox", "spinbutton", "button") and not node["ignored"]
    ]
    assert len(controls) >= 14
    assert all(node["name"]["value"].strip() for node in controls)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_texts_have_contrast_in_light_and_in_dark(server: Running, page: Page, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.go(server.url)
    luminances = page.run("""
        ["--ink", "--faint", "--bad", "--back", "--panel"].map((name) => {
          const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
          const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        })""")
    texts, grounds = luminances[:3], luminances[3:]
    assert (grounds[0] > 0.5) == (scheme == "light")
    # WCAG 2.2, AA.
    for text in texts:
        for ground in grounds:
            assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5


def test_the_page_is_served_only_where_it_is_wanted() -> None:
    with running(playground=False) as server, server.client() as client:
        assert client.get("/").status_code == 404


def test_the_page_needs_no_browser_to_be_safe(server: Running) -> None:
    with server.client() as client:
        answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"https?://", answer.text)


def test_the_picture_in_the_docs_is_small() -> None:
    picture = Path(__file__).parents[3] / "docs" / "playground.png"
    assert 5_000 < picture.stat().st_size < 150_000

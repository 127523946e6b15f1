"""A headless Chromium, driven by its own protocol."""

import base64
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""None where no browser is installed."""


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._num_calls = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Have the browser do something."""
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": params}
        self._connection.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (answer := json.loads(self._connection.recv(timeout=60))).get("id") != self._num_calls:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def go(self, url: str) -> None:
        """Load a page."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 60) -> None:
        """Until an expression is true."""
        deadline_s = time.perf_counter() + timeout_s
        while not self.run(condition):
            if time.perf_counter() > deadline_s:
                raise TimeoutError(f"{condition} is never true: {self.run('document.body.innerText')}")
            time.sleep(0.01)

    def screenshot(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def opened_page(profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own."""
    assert CHROMIUM is not None, "a test that needs a browser is skipped where there is none"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1000,640"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # A browser with much to complain of would wait for a reader.
        reader = threading.Thread(target=process.stderr.read)
        try:
            address = next(line.split()[-1] for line in process.stderr if line.startswith("DevTools listening on"))
            reader.start()
            with connect(address, proxy=None, max_size=None) as connection:
                yield Page(connection)
        finally:
            process.kill()
            if reader.ident is not None:
                reader.join()

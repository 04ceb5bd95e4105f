"""Is the HuggingFace hub there? Asked before its libraries are, because they retry for half a minute.

A machine without network must hear so within seconds, so the question is one small request with a
short limit, put in a thread of its own since name resolution knows no time limit.
"""

import os
import threading
import urllib.error
import urllib.request

from sltrain_dist.utils.errors import UserError

PROBE_SECONDS = 6.0


def require_hub(subject: str, mend: str) -> None:
    """Return if the hub answers at all, whatever it answers.

    Args:
        subject: flag and value the error begins with.
        mend: what else the user can do.

    Raises:
        UserError: no answer within PROBE_SECONDS, or HF_HUB_OFFLINE is set.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(
            f"{subject}: needs the network and HF_HUB_OFFLINE is set; unset it, or {mend}"
        )
    failure = ["no answer"]
    thread = threading.Thread(target=_probe, args=(endpoint, failure), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if failure:
        raise UserError(
            f"{subject}: {endpoint} cannot be reached ({failure[0]}); "
            f"check the network or HF_ENDPOINT, or {mend}"
        )


def _probe(endpoint: str, failure: list[str]) -> None:
    """Empty ``failure`` if ``endpoint`` answers, else leave the reason in it."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS - 1).close()
    except urllib.error.HTTPError:
        pass  # an error page is an answer
    except (OSError, ValueError) as error:
        failure[0] = str(getattr(error, "reason", error))
        return
    failure.clear()

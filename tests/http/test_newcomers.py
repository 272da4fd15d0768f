"""A request that names an SAE which is listed for the model and not served yet."""

from __future__ import annotations

import pytest
from served import MODEL, TEXT, Served, running, small_settings, until

from neuronpedia_inference.runtime import Runtime

OTHER = "10-res-4k"


def asked(served: Served, source: str = OTHER) -> tuple[int, dict[str, object], str | None]:
    body = {"prompt": TEXT, "model": MODEL, "source": source, "index": "3432"}
    with served.client() as client:
        answer = client.post("/v1/activation/single", json=body)
    return answer.status_code, answer.json(), answer.headers.get("Retry-After")


@pytest.mark.parametrize("allowed", [True, False])
def test_it_comes_where_that_is_allowed_and_the_others_are_answered(allowed: bool) -> None:
    settings = small_settings(sae_sets="15-res-4k", download_on_request=allowed)
    runtime = Runtime.load(settings)
    with running(settings, lambda: runtime) as served:
        status, body, retry_after = asked(served)
        assert asked(served, "15-res-4k")[0] == 200
        if not allowed:
            assert (status, body["code"], retry_after) == (400, "unknown_source", None)
            assert "DOWNLOAD_ON_REQUEST=1" in str(body["error"])
            assert asked(served)[0] == 400
            assert [source.name for source in runtime.shelf.sources] == ["15-res-4k"]
        else:
            assert (status, body["code"], retry_after) == (503, "source_coming", "10")
            assert f"Source '{OTHER}' is being fetched" in str(body["error"])
            until(lambda: asked(served)[0] == 200)
            configured = Runtime.load(small_settings(sae_sets=OTHER))
            with running(configured.settings, lambda: configured) as other:
                assert asked(other)[1] == asked(served)[1]
            configured.close()
            assert [source.name for source in runtime.shelf.sources] == ["15-res-4k", OTHER]
        assert asked(served, "9-res-4k")[1]["code"] == "unknown_source"
    runtime.close()

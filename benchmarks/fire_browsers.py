"""Part 3: what a web page can do to a server on loopback."""

from __future__ import annotations

import httpx

from benchmarks.fire_tree import MODEL, Served, Tree, told

BODY = {"model": MODEL, "text": "Hi"}
FOREIGN = "https://evil.example"
PREFLIGHT = {"Origin": FOREIGN, "Access-Control-Request-Method": "POST"}
OWN = "x--y.modal.run"


def asked(served: Served, **headers: str) -> httpx.Response:
    return served.http.post("/v1/tokenize", json=BODY, headers=headers)


def answered(served: Served, **headers: str) -> None:
    answer = asked(served, **headers)
    assert answer.status_code == 200, f"{headers}: {told(answer)}"


def refused(served: Served, **headers: str) -> str:
    answer = asked(served, **headers)
    assert answer.status_code == 403, f"{headers}: {short_of(answer)}"
    return told(answer)


def short_of(answer: httpx.Response) -> str:
    return told(answer)[:60]


def a_name_that_was_made_to_point_here_is_refused(tree: Tree) -> str:
    """Without SECRET only a loopback `Host`: DNS rebinding leads nowhere."""
    for host in ("127.0.0.1:5002", "localhost", "[::1]:1"):
        answered(tree.open, Host=host)
    said = [refused(tree.open, Host=host) for host in ("evil.example", "evil.example:5002", "127.0.0.1.evil.example")]
    return said[0]


def pages_of_others_can_not_drive_it(tree: Tree) -> str:
    """Without SECRET only a loopback `Origin`; a request without one, as programs send it, is judged by Host alone."""
    answered(tree.open)
    answered(tree.open, Origin="http://localhost:3000")
    said = refused(tree.open, Origin=FOREIGN)
    refused(tree.open, Origin="null")
    preflight = tree.open.http.options("/v1/tokenize", headers=PREFLIGHT)
    assert preflight.status_code == 403, f"a preflight: {short_of(preflight)}"
    return said


def pages_of_others_can_not_read_it(tree: Tree) -> str:
    """A page without permission reads nothing: no answer to it names its origin, or any."""
    answer = tree.open.http.get("/v1/capabilities", headers={"Origin": FOREIGN})
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed is None, f"{answer.status_code}, for {allowed}"
    return f"{answer.status_code}, for no origin"


def more_can_be_allowed(tree: Tree) -> str:
    """ALLOWED_HOSTS and ALLOWED_ORIGINS say more, and no more than that."""
    allowed = {"ALLOWED_HOSTS": "box.lan", "ALLOWED_ORIGINS": "https://page.example"}
    with tree.serving(*tree.small_words, env=allowed) as served:
        answered(served, Host="box.lan")
        answered(served, Origin="https://page.example")
        refused(served, Host="evil.example")
        return refused(served, Origin=FOREIGN)


def with_a_secret_all_is_as_before(tree: Tree) -> str:
    """With SECRET as now: any page and any name, with the secret. (232fc0c does so too: it is to stay.)"""
    answered(tree.locked, Host="evil.example", Origin=FOREIGN)
    with httpx.Client(base_url=tree.locked.url) as stranger:
        answer = stranger.post("/v1/tokenize", json=BODY, headers={"Origin": FOREIGN})
    assert answer.status_code == 401, told(answer)
    return "a foreign host and origin are answered with the secret, and get a 401 without"


def the_modal_door_knows_its_name(tree: Tree) -> str:
    """The Modal door adds its own web address at start, so that a keyless deployment works: `Host: x--y.modal.run`."""
    model = {"MODEL_ID": str(tree.small), "SAE_SETS": "[]", "GPU": "none"}
    foreign = ({"Host": "evil.example"}, {"Host": f"{OWN}.evil.example"}, {"Host": OWN, "Origin": FOREIGN})
    with tree.serving(fault="door", env=model) as served:
        answered(served, Host=OWN)
        answered(served, Host=OWN, Origin=f"https://{OWN}")
        for headers in foreign:  # without a body, of which another server than ours makes nothing
            answer = served.http.get("/v1/capabilities", headers=headers)
            assert answer.status_code == 403, f"{headers}: {short_of(answer)}"
    return f"{OWN} and its pages are answered, {len(foreign)} others are not"


PROBES = {
    3: (
        a_name_that_was_made_to_point_here_is_refused,
        pages_of_others_can_not_drive_it,
        pages_of_others_can_not_read_it,
        more_can_be_allowed,
        with_a_secret_all_is_as_before,
        the_modal_door_knows_its_name,
    )
}

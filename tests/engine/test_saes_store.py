"""Who is in memory, who has to wait, and how every request ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from neuronpedia_inference.errors import (
    EngineFailed,
    LimitExceeded,
    NotReady,
    OutOfMemory,
    StartupError,
    UnknownSource,
)
from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.describe import Described
from neuronpedia_inference.saes.residency import PATIENCE
from neuronpedia_inference.saes.store import Lease, SaeStore
from tests.engine.stores import NAMES, SOON, SPECS, Device, Loader, got, make, touch, two_tiers


class TestStart:
    def test_every_source_is_described_in_order_and_nothing_is_loaded(self) -> None:
        store, loader = make(2, used=False)
        assert tuple(source.name for source in store.sources) == NAMES
        assert not loader.loads
        assert store.stats() == {
            "sources": 6,
            "max_loaded": 2,
            "budget_bytes": 0,
            "resident": 0,
            "resident_bytes": 0,
            "peak_bytes": 0,
            "host": 0,
            "host_budget_bytes": 0,
            "host_peak_bytes": 0,
            "leased": 0,
            "hits": 0,
            "loads": 0,
            "uploads": 0,
            "evictions": 0,
            "features_read": 0,
        }

    def test_progress_is_said(self) -> None:
        loader, lines = Loader(), list[str]()
        store = SaeStore(SPECS, dtype="float32", device="cpu", max_loaded=2, describe=loader.describe, load=loader)
        assert store.sources == ()
        store.describe_all(lines.append)
        store.describe_all(lines.append)
        assert lines[1] == "SAE 2 of 6: 1-res-t"
        assert len(lines) == 6

    def test_a_bad_sae_stops_the_start(self) -> None:
        loader, bad = Loader(), StartupError("SAE '3-res-t': broken")

        def describe(spec: SourceSpec, dtype: str, /) -> Described:
            if spec.name == "3-res-t":
                raise bad
            return loader.describe(spec, dtype)

        store = SaeStore(SPECS, dtype="float32", device="cpu", max_loaded=2, describe=describe, load=loader)
        with pytest.raises(StartupError) as caught:
            store.describe_all()
        assert caught.value is bad
        assert [source.name for source in store.sources] == ["0-res-t", "1-res-t", "2-res-t"]

    def test_as_many_are_brought_in_as_fit(self) -> None:
        store, loader = make(5, Loader({"1-res-t": 9, "2-res-t": 3}), budget=6, used=False)
        store.fill()
        assert set(loader.loads) == {"0-res-t", "2-res-t", "3-res-t", "4-res-t"}
        assert store.stats()["evictions"] == 0


class TestTooLarge:
    def test_one_larger_than_the_budget_is_refused_whole_and_the_others_are_served(self) -> None:
        store, loader = make(loader=Loader({"3-res-t": 5 * 2**30}), budget=2**32, used=False)
        refused = r"All features of '3-res-t' take 5 GiB.*SAE_MEMORY_GIB leaves 4 GiB.*one by one"
        with pytest.raises(LimitExceeded, match=refused):
            touch(store, "3-res-t")
        assert not loader.loads
        touch(store, "2-res-t")

    def test_the_host_has_a_bound_of_its_own(self) -> None:
        loader, device = Loader({"3-res-t": 5}), Device()
        store = SaeStore(
            SPECS,
            dtype="float32",
            device="elsewhere",
            max_loaded=9,
            host_bytes=4,
            budget_bytes=9,
            describe=loader.describe,
            load=loader,
            place=device,
        )
        store.describe_all()
        with pytest.raises(LimitExceeded, match="SAE_HOST_GIB"):
            touch(store, "3-res-t")
        touch(store, "0-res-t", "1-res-t", "2-res-t", "4-res-t", "5-res-t")
        assert (loader.memory.most, device.memory.most) == (4, 5)
        assert (store.stats()["host_peak_bytes"], store.stats()["host_budget_bytes"]) == (4, 4)

    def test_one_of_exactly_the_budget_is_served(self) -> None:
        store, loader = make(loader=Loader({"3-res-t": 4}), budget=4)
        touch(store, "3-res-t", "0-res-t", "3-res-t")
        assert store.stats()["peak_bytes"] == 4
        assert loader.loads["3-res-t"] == 3  # 4 and 5 were used after it, then 0


class TestWhoStays:
    def test_the_last_loaded_stay(self) -> None:
        store, loader = make(2)
        touch(store, *NAMES[-2:])
        assert store.stats()["hits"] == 2
        assert loader.loads == Counter(NAMES)

    def test_the_least_recently_used_leaves(self) -> None:
        store, loader = make(2)
        touch(store, "4-res-t", "0-res-t", "4-res-t")  # 5 leaves, for 4 was used after it
        assert loader.loads["4-res-t"] == 1
        touch(store, "5-res-t")
        assert loader.loads["5-res-t"] == 2

    def test_a_leased_one_stays_whatever_comes(self) -> None:
        store, loader = make(2)
        with store.lease("0-res-t") as first:
            for name in NAMES * 2:
                touch(store, name)
                assert store.stats()["resident"] <= 2
            with store.lease("0-res-t") as again:
                assert again is first
        assert loader.loads["0-res-t"] == 2

    def test_as_many_leave_as_are_needed_and_no_more(self) -> None:
        store, _ = make(loader=Loader({"5-res-t": 3}), budget=5)
        touch(store, "0-res-t", "1-res-t", "2-res-t", "3-res-t", "4-res-t")  # one byte each
        before = store.stats()["evictions"]
        touch(store, "5-res-t")
        assert store.stats()["evictions"] == before + 3
        hits = store.stats()["hits"]
        touch(store, "3-res-t", "4-res-t")
        assert store.stats()["hits"] == hits + 2

    def test_a_lease_may_be_released_twice(self) -> None:
        store, _ = make(2)
        first, second = got(store.request("5-res-t")), got(store.request("5-res-t"))
        first.release()
        first.release()
        assert store.stats()["leased"] == 1
        second.release()
        assert store.stats()["leased"] == 0
        touch(store, "0-res-t", "1-res-t", "5-res-t")
        first.release()  # of an SAE that has left and come back

    def test_an_error_inside_a_lease_ends_it(self) -> None:
        store, _ = make(1)
        with pytest.raises(ZeroDivisionError), store.lease("0-res-t"):
            raise ZeroDivisionError
        assert store.stats()["leased"] == 0

    def test_unknown_names_are_refused_with_the_nearest(self) -> None:
        store, _ = make(2)
        for ask in (store.source, store.request, lambda name: store.lease(name).__enter__()):
            with pytest.raises(UnknownSource, match="'9-res-t'.*Did you mean"):
                ask("9-res-t")


class TestNobodyWaitsForAnother:
    def test_a_slow_load_does_not_hold_up_what_is_there(self) -> None:
        store, loader = make(3)
        gate = loader.stop_at("0-res-t")
        slow = store.request("0-res-t")
        assert loader.entered["0-res-t"].wait(SOON)
        for _ in range(3):
            future = store.request("5-res-t")
            assert future.done()
            got(future).release()
        assert store.stats()["resident"] == 2  # its room is made, and it is not there yet
        assert not slow.done()
        gate.set()
        got(slow).release()

    def test_several_requests_share_one_load(self) -> None:
        store, loader = make(2)
        gate = loader.stop_at("0-res-t")
        futures = [store.request("0-res-t") for _ in range(4)]
        assert store.stats()["leased"] == 0
        gate.set()
        leases = [got(future) for future in futures]
        assert len({id(lease.reader) for lease in leases}) == 1
        assert loader.loads["0-res-t"] == 2
        for lease in leases:
            assert store.stats()["leased"] == 1
            lease.release()
        assert store.stats()["leased"] == 0

    def test_one_that_lacks_room_waits_for_a_release_and_the_others_are_served(self) -> None:
        store, loader = make(2)
        first, second = got(store.request("0-res-t")), got(store.request("1-res-t"))
        waiting = store.request("2-res-t")
        again = store.request("0-res-t")
        assert again.done()
        got(again).release()
        assert not waiting.done()
        first.release()
        with got(waiting) as reader:
            assert reader.source.name == "2-res-t"
            assert store.stats()["leased"] == store.stats()["resident"] == 2
        second.release()
        assert loader.loads["1-res-t"] == 2

    def test_a_younger_one_that_fits_goes_first_unless_it_takes_the_room_of_the_elder(self) -> None:
        store, _ = make(loader=Loader({"0-res-t": 5, "1-res-t": 4, "2-res-t": 2, "3-res-t": 1, "4-res-t": 1}), budget=8)
        large = got(store.request("0-res-t"))
        elder = store.request("1-res-t")  # 5 + 4 > 8
        small = got(store.request("2-res-t"))  # 2 + 4 <= 8
        third = got(store.request("3-res-t"))  # and 1 more
        last = store.request("5-res-t")
        assert store.stats()["resident_bytes"] == 8
        assert not last.done()
        small.release()
        got(last).release()
        assert not elder.done()
        large.release()
        with got(elder):
            assert store.stats()["resident_bytes"] <= 8
        third.release()

    def test_one_that_would_take_the_room_of_the_elder_waits_for_it(self) -> None:
        store, loader = make(loader=Loader({"0-res-t": 5, "1-res-t": 6, "2-res-t": 3, "3-res-t": 2}), budget=8)
        large = got(store.request("0-res-t"))
        elder, younger = store.request("1-res-t"), store.request("2-res-t")  # 5 + 3 <= 8, but 6 + 3 > 8
        got(store.request("3-res-t")).release()  # 2 + 6 <= 8
        assert loader.loads["3-res-t"] == 2
        assert not younger.done()
        large.release()
        with got(elder):
            assert not younger.done()
        got(younger).release()

    def test_leases_that_overlap_for_ever_do_not_starve_the_one_that_waits(self) -> None:
        store, _ = make(1)
        held = got(store.request("0-res-t"))
        waiting = store.request("1-res-t")
        n_overtaken = 0
        while (following := store.request("0-res-t")).done():
            held.release()
            held = got(following)
            n_overtaken += 1
            assert n_overtaken < 10**6
        assert n_overtaken >= PATIENCE
        assert not waiting.done()  # and now the other takes its turn
        held.release()
        got(waiting).release()
        got(following).release()

    def test_one_that_loads_slowly_does_not_hold_up_another(self) -> None:
        store, loader = make(3)
        gates = [loader.stop_at("0-res-t"), loader.stop_at("1-res-t")]
        slow = [store.request("0-res-t"), store.request("1-res-t")]
        for name in ("0-res-t", "1-res-t"):
            assert loader.entered[name].wait(SOON)  # both at once
        touch(store, "2-res-t")
        assert not any(future.done() for future in slow)
        for gate in gates:
            gate.set()
        for future in slow:
            got(future).release()

    def test_callbacks_may_ask_for_more(self) -> None:
        store, _ = make(1)
        order: list[str] = []
        ended = threading.Event()

        def use(name: str, then: Callable[[], object]) -> None:
            def ready(future: Future[Lease]) -> None:
                with future.result() as reader:
                    order.append(reader.source.name)
                then()

            store.request(name).add_done_callback(ready)

        use("0-res-t", lambda: use("1-res-t", lambda: use("2-res-t", ended.set)))
        assert ended.wait(SOON)
        assert order == ["0-res-t", "1-res-t", "2-res-t"]
        assert store.stats()["leased"] == 0


class TestCancelling:
    def test_what_nobody_wants_any_more_is_not_loaded(self) -> None:
        store, loader = make(1)
        first = got(store.request("0-res-t"))
        second, third = store.request("1-res-t"), store.request("2-res-t")
        assert second.cancel()
        first.release()
        got(third).release()
        assert loader.loads["1-res-t"] == 1

    def test_a_load_under_way_leaves_no_lease(self) -> None:
        store, loader = make(2)
        gate = loader.stop_at("0-res-t")
        future = store.request("0-res-t")
        assert loader.entered["0-res-t"].wait(SOON)
        assert future.cancel()
        gate.set()
        touch(store, "0-res-t")
        assert loader.loads["0-res-t"] == 2
        assert store.stats()["leased"] == 0
        assert store.request("0-res-t").done()

    def test_one_that_waits_for_room_gives_up_its_turn(self) -> None:
        store, loader = make(loader=Loader({"0-res-t": 3, "1-res-t": 5, "4-res-t": 2}), budget=6)
        held = got(store.request("0-res-t"))
        touch(store, "3-res-t")  # 1, 2 and 4 are not there
        waiting, younger = store.request("1-res-t"), store.request("4-res-t")
        small = got(store.request("2-res-t"))  # has been loaded: the loader has passed over those two
        assert not younger.done()
        assert waiting.cancel()
        got(younger).release()
        small.release()
        held.release()
        assert loader.loads["1-res-t"] == 1

    def test_a_race_with_the_end_leaves_no_lease_either_way(self) -> None:
        store, _ = make(1)
        outcomes: Counter[bool] = Counter()
        for number in range(300):
            future = store.request(NAMES[number % 2])
            if number % 3 == 0:
                threading.Event().wait(0.0002)
            cancelled = future.cancel()
            outcomes[cancelled] += 1
            if not cancelled:
                assert future.done()
                future.result().release()
        assert outcomes[True]
        assert outcomes[False]
        touch(store, *NAMES)
        assert store.stats()["leased"] == 0
        assert store.stats()["resident"] == 1


class TestFailing:
    def test_a_failed_reload_fails_those_who_asked_for_it_and_can_be_tried_again(self) -> None:
        store, loader = make(1)
        cause = loader.broken["0-res-t"] = StartupError("SAE '0-res-t': broken")
        gate = loader.stop_at("0-res-t")
        bad, also_bad, good = store.request("0-res-t"), store.request("0-res-t"), store.request("1-res-t")
        gate.set()
        for future in (bad, also_bad):
            with pytest.raises(
                EngineFailed, match="'0-res-t' could not be loaded; the server's log says why"
            ) as caught:
                got(future)
            assert caught.value.__cause__ is cause
        got(good).release()
        assert store.stats()["leased"] == 0
        loader.broken.clear()
        touch(store, "0-res-t")

    def test_a_full_device_says_so(self) -> None:
        store, loader, device = two_tiers(6, 2)
        device.broken.add("0-res-t")
        with pytest.raises(OutOfMemory, match="no room for 0-res-t"):
            touch(store, "0-res-t")
        device.broken.clear()
        touch(store, "0-res-t")
        assert loader.loads == Counter(NAMES)
        stats = store.stats()
        assert stats["uploads"] - stats["evictions"] == stats["resident"]

    def test_nobody_waits_for_ever_after_an_error_nobody_foresaw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store, loader = make(1)
        seen: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
        loader.broken["0-res-t"] = ZeroDivisionError()
        gate = loader.stop_at("0-res-t")
        bad, good = store.request("0-res-t"), store.request("1-res-t")
        gate.set()
        with pytest.raises(EngineFailed, match="log says why"):
            got(bad)
        got(good).release()
        loader.broken.clear()
        touch(store, "0-res-t")
        assert seen == [ZeroDivisionError]

    def test_one_that_has_changed_on_disk_is_refused(self) -> None:
        store, loader = make(1, budget=5)
        loader.sizes["0-res-t"] = 3
        with pytest.raises(EngineFailed) as caught:
            touch(store, "0-res-t")
        assert "has changed since the start" in str(caught.value.__cause__)
        assert loader.memory.n_bytes == store.stats()["resident_bytes"] == 0
        touch(store, "1-res-t")


class TestClosing:
    def test_those_who_wait_are_told(self) -> None:
        store, loader = make(1)
        gate = loader.stop_at("0-res-t")
        held = got(store.request("5-res-t"))
        waiting = [store.request("0-res-t"), store.request("1-res-t")]
        store.close()
        store.close()
        for future in (*waiting, store.request("5-res-t")):
            with pytest.raises(NotReady):
                got(future)
        assert held.reader.source.name == "5-res-t"
        held.release()
        gate.set()
        assert store.stats()["leased"] == 0

    def test_no_thread_is_left(self) -> None:
        before = set(threading.enumerate())
        store, loader = make(2)
        gate = loader.stop_at("1-res-t")
        held, _ = got(store.request("0-res-t")), store.request("1-res-t")
        loaders = set(threading.enumerate()) - before
        assert loaders
        assert all(loader.daemon for loader in loaders)
        store.close()
        gate.set()
        for thread in loaders:
            thread.join(SOON)
            assert not thread.is_alive()
        held.release()

    def test_a_store_that_rests_has_no_thread(self) -> None:
        before = set(threading.enumerate())
        store, _ = make(1)
        touch(store, *NAMES)
        for thread in set(threading.enumerate()) - before:
            thread.join(SOON)
            assert not thread.is_alive()

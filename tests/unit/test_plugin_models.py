"""Models of a program's own that are kept with the volume; and objects among the models that are none."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from novafs import CacheConfig, HierarchicalCache, register_model, unregister_model
from novafs.errors import ConfigError, ObjectCorruptError
from novafs.pluginmodels import DATA_MAX, KIND, VERSION, PluginRecord, merge_plugins, plugin_name, read_plugin
from novafs.prefetch.blob import seal_model
from novafs.record import seal
from novafs.revisions import revision_name
from tests.support.cli_fixtures import Cli

OPTIONS = ("--l2-url", "none")


@pytest.fixture(autouse=True)
def _forget_models() -> Iterator[None]:
    yield
    for name in ("counting", "keeper"):
        unregister_model(name)


class Counting:
    """A predictor that counts keys, and keeps that."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def observe(self, key: str, stream: int) -> None:
        self.counts[key] = self.counts.get(key, 0) + 1

    def predict(self, key: str, n: int) -> Sequence[tuple[str, float]]:
        found = sorted(self.counts, key=lambda k: -self.counts[k])
        return [(k, 0.01) for k in found[:n]]

    def save(self) -> bytes:
        return json.dumps(self.counts).encode()

    def load(self, data: bytes) -> None:
        self.counts = {str(key): int(count) for key, count in json.loads(data).items()}


class Merging(Counting):
    """The same, joined with what is there."""

    def merge(self, mine: bytes, theirs: bytes) -> bytes:
        one, other = json.loads(mine), json.loads(theirs)
        return json.dumps({key: max(one.get(key, 0), other.get(key, 0)) for key in one | other}).encode()


def opened(directory: Path, name: str = "state", **fields: Any) -> HierarchicalCache:
    return HierarchicalCache(directory / "volume", CacheConfig(state_dir=directory / name, l1_capacity="32MiB", fresh_s=0.0, **fields))


def counts_of(cache: HierarchicalCache) -> dict[str, int]:
    plugged = cache._portal.value._keys._plugged
    assert isinstance(plugged, Counting)
    return plugged.counts


def test_what_a_predictor_has_learned_is_known_to_the_next_process(tmp_path: Path) -> None:
    register_model("counting", Counting)
    for turn in range(3):
        with opened(tmp_path, predictor="counting") as cache:
            assert counts_of(cache) == ({"a": turn} if turn else {})
            cache.set("a", b"x")
            cache.get("a")
    # One that may learn nothing saves nothing, and knows all the same.
    with opened(tmp_path, predictor="counting", enable_online=False) as cache:
        assert counts_of(cache) == {"a": 3}
        cache.get("a")
    with opened(tmp_path, predictor="counting") as cache:
        assert counts_of(cache) == {"a": 3}


@pytest.mark.parametrize(("model", "joined"), [(Counting, {"b": 1}), (Merging, {"a": 1, "b": 1})])
def test_two_processes_that_save_are_joined_where_the_model_can(tmp_path: Path, model: type[Counting], joined: dict[str, int]) -> None:
    register_model("counting", model)
    with opened(tmp_path, predictor="counting") as one, opened(tmp_path, "two", predictor="counting") as two:
        two.set_multi({"a": b"1", "b": b"2"})
        assert one.get("a") == b"1"
        two.get("b")
        one.close()
    with opened(tmp_path, predictor="counting") as cache:
        assert counts_of(cache) == joined


def test_what_a_scorer_has_learned_is_kept_as_well(tmp_path: Path) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.told = b"nothing"

        def score(self, chunks: Sequence[Any]) -> Sequence[float]:
            return [0.0] * len(chunks)

        def save(self) -> bytes:
            return self.told + b"+"

        def load(self, data: bytes) -> None:
            self.told = data

    register_model("keeper", Keeper)
    for expected in (b"nothing", b"nothing+", b"nothing++"):
        with opened(tmp_path, eviction_policy="keeper") as cache:
            assert cache._portal.value._volume.cache.l1.policy.scorer.told == expected  # type: ignore[attr-defined]


def test_such_a_model_is_listed_taken_out_put_in_and_forgotten(command: Cli, tmp_path: Path) -> None:
    register_model("counting", Counting)
    with opened(tmp_path, predictor="counting") as cache:
        cache.set("a", b"x")
        cache.get("a")
        url = cache.volume_url
    options = ("--state-dir", tmp_path / "state", *OPTIONS)
    (row,) = command.json("model", "ls", url, *options)
    assert (row["name"], row["about"], row["contents"]) == ("plugin-counting", "a program's own", "predictor of a program, 8 bytes")
    command("model", "export", url, "plugin-counting", tmp_path / "file", *options)
    other, there = f"file://{tmp_path / 'other'}", ("--state-dir", tmp_path / "there", *OPTIONS)
    command("init", other, *there)
    told = command("model", "import", other, "plugin-counting", tmp_path / "file", *there)
    assert told == "imported plugin-counting: predictor of a program, 8 bytes\n"
    wrong = command.run("model", "import", other, "plugin-keeper", tmp_path / "file", *there)
    assert wrong.status == 1
    assert "expected model 'keeper'" in wrong.err
    with HierarchicalCache(tmp_path / "other", CacheConfig(state_dir=tmp_path / "there", predictor="counting")) as cache:
        assert counts_of(cache) == {"a": 1}
    assert command("model", "reset", url, "plugin-counting", *options) == "forgot plugin-counting\n"
    assert command("model", "reset", other, *there) == "forgot plugin-counting\n"
    assert command("model", "ls", other, *there) == "nothing was learned yet\n"
    refused = command.run("model", "reset", other, "plugin-../x", *there)
    assert refused.status == 2
    assert "is no model" in refused.err


class Fails(Counting):
    """Whose keeping goes wrong, in one way or another."""

    answer: Any = b"fine"

    def save(self) -> bytes:
        if isinstance(self.answer, Exception):
            raise self.answer
        found: bytes = self.answer
        return found

    def load(self, data: bytes) -> None:
        raise ValueError("scripted: not mine")


@pytest.mark.parametrize("answer", [ZeroDivisionError("oh"), None, "text", bytes(DATA_MAX + 1)])
def test_a_model_that_can_not_be_saved_costs_a_warning(tmp_path: Path, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Here(Fails):
        pass

    Here.answer = answer
    register_model("counting", Here)
    with caplog.at_level(logging.WARNING), opened(tmp_path, predictor="counting") as cache:
        cache.set("a", b"x")
        assert cache.get("a") == b"x"
    assert "predictor model 'counting' is not saved" in caplog.text
    assert not list((tmp_path / "volume").glob("models/plugin-*/*"))


def test_a_model_that_takes_nothing_back_goes_on_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    register_model("counting", Fails)
    for _ in range(2):
        with caplog.at_level(logging.WARNING), opened(tmp_path, predictor="counting") as cache:
            cache.set("a", b"x")
            assert cache.get("a") == b"x"
    assert "which it does not take: ValueError: scripted: not mine" in caplog.text


def record(name: str = "counting", kind: str = "predictor", data: bytes = b'{"a": 1}') -> bytes:
    return seal_model(KIND, VERSION, PluginRecord(name=name, kind=kind, data=data))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x80\x04\x95garbage",
        record()[:-1],
        record()[:30] + bytes([record()[30] ^ 1]) + record()[31:],
        record(name="other"),
        record(kind="code"),
        record(data=bytes(DATA_MAX + 1)),
        seal(KIND, VERSION + 1, PluginRecord(name="counting", kind="predictor", data=b"{}")),
        seal(b"KEYS", VERSION, PluginRecord(name="counting", kind="predictor", data=b"{}")),
    ],
    ids=["empty", "pickle", "cut", "flipped", "of another", "of no kind", "too large", "newer", "other kind"],
)
def test_a_saved_model_that_is_none_never_reaches_the_program(tmp_path: Path, blob: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as cache:
        cache.set("a", b"x")
    place = tmp_path / "volume" / revision_name("models/plugin-counting/", 0)
    place.parent.mkdir(parents=True)
    place.write_bytes(blob)
    register_model("counting", Counting)
    with caplog.at_level(logging.WARNING), opened(tmp_path, predictor="counting") as cache:
        assert counts_of(cache) == {}
        assert cache.get("a") == b"x"
    assert "starts without what was saved" in caplog.text


def test_names_that_no_program_has_registered_are_none() -> None:
    assert plugin_name("plugin-counting") == "counting"
    for name in ("plugin-", "plugin-a/b", "plugin-..", "counting", "plugin-" + "x" * 41):
        assert plugin_name(name) is None
    with pytest.raises(ConfigError, match="at most 40"):
        register_model("x" * 41, Counting)
    with pytest.raises(ObjectCorruptError, match="expected model 'mine'"):
        read_plugin(record(), "somewhere", "mine")
    assert merge_plugins(b"mine", b"garbage") == b"mine"


FOREIGN = ("0README", "ZZZ", "0000000000000000", "0000000000000001", "not/a/revision")


def test_foreign_objects_among_the_models_stop_no_save(tmp_path: Path) -> None:
    """Names that no revision has, and revisions after which there is no next one: they are passed by, and stay."""
    register_model("counting", Counting)
    order = random.Random(3).sample(range(30), 30)
    with opened(tmp_path, predictor="counting") as cache:
        cache.set_multi({f"k{number}": b"%d" % number for number in order})
    models = tmp_path / "volume" / "models"
    names = ("keys", "transitions", "profiles", "gate", "plugin-counting", "nobody")
    for name in names:
        for foreign in FOREIGN:
            place = models / name / foreign
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"foreign")
    for turn in range(4):
        with opened(tmp_path, predictor="counting") as cache:
            for number in order:
                cache.get(f"k{number}")
            assert counts_of(cache) == {f"k{number}": turn + 1 for number in order}
            known = cache._portal.value._keys.model.predict(f"k{order[3]}", 1)
            assert known[0][0] == f"k{order[4]}"
            assert len(cache._portal.value._keys.model) == 30
    for name in names:
        assert all((models / name / foreign).read_bytes() == b"foreign" for foreign in FOREIGN)
    revisions = [path.name for path in (models / "keys").iterdir() if path.name not in FOREIGN and path.name != "not"]
    assert len(revisions) == 2  # the two newest, of four saves
    assert min(revisions) == f"{(1 << 64) - 1 - 3:016x}"

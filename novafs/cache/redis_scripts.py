"""The Lua scripts of L2: what must happen in one step on one shard.

A shard is three kinds of keys under one hash tag, so that a script touches one slot of a Redis Cluster:

    novafs:{<volume>:<shard>}:d:<chunk id>   the value (a string; see `novafs.cache.redis`)
    novafs:{<volume>:<shard>}:i              the index: a sorted set of members by score; the lowest is evicted first
    novafs:{<volume>:<shard>}:u              the use: a hash of `bytes`, `count` and `clock`

A member is the chunk id (32 bytes) and the length of its value (u32, little endian), so a member alone says what its
eviction frees. The use is the sum over the members of length + overhead, and how many there are.

**The score** is a time: clock + gain * span. The clock counts the shard's accesses, insertions included, from the server's
microseconds when it was first needed: so an idle night ages nobody, and a clock that was lost goes on above all scores there
are (scores of before there was a clock were the server's microseconds themselves). The span is how old a score lives to be
here: the age of the one at a twentieth of the index. Gain is what the caller makes of the chance that the chunk is asked for
again (`novafs.cache.redis.gain_of`): 0 makes the score the time of last access, and the shard an LRU; with -0.9 a chunk is
gone after a tenth of the others' time, with 3 it stays four times as long. So scores fade without being written again, all
hosts' scores are on one scale, and a host that knows nothing gives 0. (The inflation of GreedyDual, N. Young 1994, with a
clock for the threshold.) A score that is further ahead than any gain could have put it, because the span has shrunk since
or because somebody else wrote it, is brought back, `REACH` of them in each call.

Always true when a script ends: use = what the members sum up to, and never above the shard's capacity. Three things
outside may break it, and each is put right by the next script that runs:

- A value goes (evicted by the server's own `maxmemory-policy`, or deleted by hand): its member stays and is counted
  until it is the lowest or the chunk comes back. So the use may be too high for a while, never too low.
- Index or use goes, or is of another type (a flush, an eviction, a partial restore): `count` in the use differs from the
  members there are, and the use is counted again. Values without a member are taken back in when they are next read.
- A value is replaced by hand under another length: its member no longer fits, is evicted in its turn, and leaves the value alone.

Reading needs no script: GETRANGE, and later one `RATE` for many reads.

Each script gets KEYS index, use; ARGV prefix of the data keys, capacity of the shard, overhead per entry, and what it works
on. It answers {bytes, count, evicted, done, now}: the use when it ended, what it did, and the server's time in µs. Data keys
are made from prefix and id: they are in the same slot.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

GAIN_MIN: Final = -0.9
GAIN_MAX: Final = 3.0
SPAN_MAX: Final = 64
"""The span's bound in accesses for each entry: what an index of garbage, or a clock that was lost, may make of it."""
SLACK: Final = 1000
REACH: Final = 16
"""Scores that one call brings back at most: it has others to do, and so has the server."""

_COMMON: Final = (
    f"""
local GAIN_MIN, GAIN_MAX, SPAN_MAX, SLACK, REACH = {GAIN_MIN}, {GAIN_MAX}, {SPAN_MAX}, {SLACK}, {REACH}
"""
    + """
local index, use, prefix = KEYS[1], KEYS[2], ARGV[1]
local capacity, overhead = tonumber(ARGV[2]), tonumber(ARGV[3])
local bytes, count, evicted, done = 0, 0, 0, 0
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local clock

local function member_of(id, length) return id .. struct.pack('<I4', length) end
local function cost_of(member)
  if #member ~= 36 then return 0 end
  return struct.unpack('<I4', member, 33) + overhead
end
-- Length of a value; nil where there is none, or where the key is of another type.
local function length_of(key)
  local length = redis.pcall('STRLEN', key)
  if type(length) ~= 'number' or length == 0 then return nil end
  return length
end

local function load_use()
  local members = redis.pcall('ZCARD', index)
  if type(members) ~= 'number' then
    redis.call('DEL', index)
    members = 0
  end
  local kept = redis.pcall('HMGET', use, 'bytes', 'count', 'clock')
  if kept.err then
    redis.call('DEL', use)
    kept = {}
  end
  bytes, count, clock = tonumber(kept[1] or nil), tonumber(kept[2] or nil), tonumber(kept[3] or nil)
  -- No clock is ahead of its server's: what is, somebody else has written. (What is no number compares false.)
  if not (clock and clock > 0 and clock <= now) then clock = now end
  if bytes == nil or count ~= members then
    bytes, count = 0, members
    for _, member in ipairs(redis.call('ZRANGE', index, 0, -1)) do bytes = bytes + cost_of(member) end
  end
end

local function save_use()
  if count == 0 then bytes = 0 end
  local numbers = {bytes, count, clock}
  for at = 1, 3 do numbers[at] = string.format('%.0f', numbers[at]) end
  redis.call('HSET', use, 'bytes', numbers[1], 'count', numbers[2], 'clock', numbers[3])
end

local function evict_to(most)
  while bytes > most do
    local popped = redis.call('ZPOPMIN', index)
    local member = popped[1]
    if not member then
      bytes, count = 0, 0
      return
    end
    bytes, count, evicted = bytes - cost_of(member), count - 1, evicted + 1
    if #member == 36 then
      local key = prefix .. string.sub(member, 1, 32)
      if length_of(key) == struct.unpack('<I4', member, 33) then redis.call('UNLINK', key) end
    end
  end
end

load_use()

local low = redis.call('ZRANGE', index, math.floor(count / 20), math.floor(count / 20), 'WITHSCORES')
local span = math.min(SPAN_MAX * count, math.max(0, clock - (tonumber(low[2] or nil) or clock)))
local function score_of(gain)
  gain = tonumber(gain) or 0
  if gain ~= gain then gain = 0 end
  return string.format('%.0f', clock + math.max(GAIN_MIN, math.min(GAIN_MAX, gain)) * span)
end
local function rate(member, gain)
  clock = clock + 1
  redis.call('ZADD', index, score_of(gain), member)
end
-- Before anything is evicted: what stands too far ahead would never be.
local function pull_back()
  for _ = 1, REACH do
    local top = redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')
    if not top[1] or (tonumber(top[2]) or math.huge) <= clock + 2 * GAIN_MAX * span + SLACK then return end
    redis.call('ZADD', index, score_of(GAIN_MAX), top[1])
  end
end
"""
)

_PUT: Final = """
-- ARGV[4] bytes to evict beyond what capacity asks for (the server had no memory for us); then id, gain, value, id, gain, value, …
-- `done` counts what was stored. An error of SET is answered only where nothing was stored.
if tonumber(ARGV[4]) > 0 then evict_to(math.max(0, bytes - ARGV[4])) end
pull_back()
local failure
for at = 5, #ARGV, 3 do
  local id, gain, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local key, length = prefix .. id, #value
  local member, cost = member_of(id, length), length + overhead
  if cost <= capacity then
    local old = length_of(key)
    if old and old ~= length and redis.call('ZREM', index, member_of(id, old)) == 1 then
      bytes, count = bytes - old - overhead, count - 1
      redis.call('UNLINK', key)
    end
    local known = redis.call('ZSCORE', index, member)
    if not known then evict_to(capacity - cost) end
    local stored = redis.pcall('SET', key, value)
    if stored.err then
      failure = stored
      break
    end
    rate(member, gain)
    if not known then bytes, count = bytes + cost, count + 1 end
    done = done + 1
  end
end
if failure and done == 0 and evicted == 0 then return failure end
save_use()
return {bytes, count, evicted, done, now}
"""

_RATE: Final = """
-- ARGV[4…] id, gain, id, gain, …, oldest access first. A value that the index has lost is taken back in.
pull_back()
for at = 4, #ARGV, 2 do
  local length = length_of(prefix .. ARGV[at])
  if length and length + overhead <= capacity then
    local member, cost = member_of(ARGV[at], length), length + overhead
    if not redis.call('ZSCORE', index, member) then
      evict_to(capacity - cost)
      bytes, count = bytes + cost, count + 1
    end
    rate(member, ARGV[at + 1])
    done = done + 1
  end
end
if bytes > capacity then evict_to(capacity) end
save_use()
return {bytes, count, evicted, done, now}
"""

_DELETE: Final = """
-- ARGV[4…] ids.
for at = 4, #ARGV do
  local key = prefix .. ARGV[at]
  local length = length_of(key)
  if length and redis.call('ZREM', index, member_of(ARGV[at], length)) == 1 then
    bytes, count = bytes - length - overhead, count - 1
  end
  done = done + redis.call('UNLINK', key)
end
save_use()
return {bytes, count, evicted, done, now}
"""


class Script(NamedTuple):
    """text: Lua. sha: what EVALSHA calls it, hex."""

    text: str
    sha: str


def _script(body: str) -> Script:
    text = _COMMON + body
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


PUT: Final = _script(_PUT)
RATE: Final = _script(_RATE)
DELETE: Final = _script(_DELETE)

"""The Lua scripts of L2: what must happen in one step on one shard.

A shard is three kinds of keys under one hash tag, so that a script touches one slot of a Redis Cluster:

    novafs:{<volume>:<shard>}:d:<chunk id>   the value (a string; see `novafs.cache.redis`)
    novafs:{<volume>:<shard>}:i              the index: a sorted set of members, scored by the server's time of last access, µs
    novafs:{<volume>:<shard>}:u              the use: a hash of `bytes` and `count`

A member is the chunk id (32 bytes) and the length of its value (u32, little endian), so a member alone says what its
eviction frees. The use is the sum over the members of length + overhead, and how many there are.

Always true when a script ends: use = what the members sum up to, and never above the shard's capacity. Three things
outside may break it, and each is put right by the next script that runs:

- A value goes (evicted by the server's own `maxmemory-policy`, or deleted by hand): its member stays and is counted
  until it is the oldest or the chunk comes back. So the use may be too high for a while, never too low.
- Index or use goes, or is of another type (a flush, an eviction, a partial restore): `count` in the use differs from the
  members there are, and the use is counted again. Values without a member are taken back in when they are next read.
- A value is replaced by hand under another length: its member no longer fits, is evicted in its turn, and leaves the value alone.

Reading needs no script: GETRANGE, and later one `TOUCH` for many reads.

Each script gets KEYS index, use; ARGV prefix of the data keys, capacity of the shard, overhead per entry, and what it works
on. It answers {bytes, count, evicted, done, now}: the use when it ended, what it did, and the server's time in µs. Data keys
are made from prefix and id: they are in the same slot.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

_COMMON: Final = """
local index, use, prefix = KEYS[1], KEYS[2], ARGV[1]
local capacity, overhead = tonumber(ARGV[2]), tonumber(ARGV[3])
local bytes, count, evicted, done = 0, 0, 0, 0

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
  local kept = redis.pcall('HMGET', use, 'bytes', 'count')
  if kept.err then
    redis.call('DEL', use)
    kept = {}
  end
  bytes, count = tonumber(kept[1] or nil), tonumber(kept[2] or nil)
  if bytes == nil or count ~= members then
    bytes, count = 0, members
    for _, member in ipairs(redis.call('ZRANGE', index, 0, -1)) do bytes = bytes + cost_of(member) end
  end
end

local function save_use()
  if count == 0 then bytes = 0 end
  redis.call('HSET', use, 'bytes', string.format('%.0f', bytes), 'count', string.format('%.0f', count))
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

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
load_use()
"""

_PUT: Final = """
-- ARGV[4] bytes to evict beyond what capacity asks for (the server had no memory for us); then id, value, id, value, …
-- `done` counts what was stored. An error of SET is answered only where nothing was stored.
if tonumber(ARGV[4]) > 0 then evict_to(math.max(0, bytes - ARGV[4])) end
local failure
for at = 5, #ARGV, 2 do
  local id, value = ARGV[at], ARGV[at + 1]
  local key, length = prefix .. id, #ARGV[at + 1]
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
    redis.call('ZADD', index, now + at, member)
    if not known then bytes, count = bytes + cost, count + 1 end
    done = done + 1
  end
end
if failure and done == 0 and evicted == 0 then return failure end
save_use()
return {bytes, count, evicted, done, now}
"""

_TOUCH: Final = """
-- ARGV[4…] members, oldest access first. One that the index has lost is taken back in if its value is still there.
for at = 4, #ARGV do
  local member = ARGV[at]
  if redis.call('ZSCORE', index, member) then
    redis.call('ZADD', index, now + at, member)
    done = done + 1
  else
    local cost = cost_of(member)
    if cost <= capacity and length_of(prefix .. string.sub(member, 1, 32)) == cost - overhead then
      evict_to(capacity - cost)
      redis.call('ZADD', index, now + at, member)
      bytes, count, done = bytes + cost, count + 1, done + 1
    end
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
TOUCH: Final = _script(_TOUCH)
DELETE: Final = _script(_DELETE)

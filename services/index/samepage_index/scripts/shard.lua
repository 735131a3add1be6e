-- What the scripts on a shard have in common; it is put before each of them.
--
-- KEYS[1] is a shard: a hash whose field '' holds four little-endian u32 (buckets, entries,
-- distinct keys, merges so far), and whose other fields are buckets: field = 3-byte bucket number,
-- value = entries of 10 bytes (8-byte key, 2-byte holder number), in no order. The key's last three
-- bytes say which bucket, by linear hashing: the number of buckets changes by one, and only one
-- bucket is split or merged then, so that no call takes long however large the shard is.
-- Searches look at a key's first bytes first, and those differ within a bucket.

local sub, byte, find, char, floor = string.sub, string.byte, string.find, string.char, math.floor
local call = redis.call

local KEY, ENTRY = 8, 10
-- Entries a bucket, on average. More cost less memory and more time: Lua hashes every string.
local LOAD = 48
-- Keys at a time; `unpack` takes some thousands at most.
local CHUNK = 512

local shard = KEYS[1]
local buckets, entries, distinct, merges = 1, 0, 0, 0
-- The least power of two that is not below `buckets`, and half of it.
local wide, narrow = 1, 1

local function set_widths()
  wide = 1
  while wide < buckets do wide = wide * 2 end
  narrow = math.max(wide / 2, 1)
end

local function load_shard()
  local meta = call('HGET', shard, '')
  if meta then
    buckets, entries, distinct, merges = struct.unpack('<I4I4I4I4', meta)
    set_widths()
  end
end

local function save_shard()
  if entries == 0 then
    call('DEL', shard)
  else
    call('HSET', shard, '', struct.pack('<I4I4I4I4', buckets, entries, distinct, merges))
  end
end

local function hash_at(text, at)
  local a, b, c = byte(text, at + 5, at + 7)
  return a + b * 256 + c * 65536
end

local function bucket_at(text, at)
  local hash = hash_at(text, at)
  local number = hash % wide
  if number >= buckets then number = hash % narrow end
  return number
end

local function field(number)
  return char(number % 256, floor(number / 256) % 256, floor(number / 65536))
end

-- Write the buckets of `changed` (number -> contents); empty ones go.
local function write(changed)
  local full, empty = {}, {}
  for number, value in pairs(changed) do
    if value == '' then
      empty[#empty + 1] = field(number)
    else
      full[#full + 1] = field(number)
      full[#full + 1] = value
    end
  end
  if #full > 0 then call('HSET', shard, unpack(full)) end
  if #empty > 0 then call('HDEL', shard, unpack(empty)) end
end

-- Where an entry that begins with `text` (a key, or a key and a holder) is, from `init` on.
local function entry_at(value, text, init)
  local at = find(value, text, init, true)
  while at and at % ENTRY ~= 1 do at = find(value, text, at + 1, true) end
  return at
end

local function without(value, at)
  return sub(value, 1, at - 1) .. sub(value, at + ENTRY)
end

-- Call visit(keys at a position, bucket's number, bucket's contents) for packed keys; chunk by
-- chunk, finish(contents by bucket number) after each.
local function each_key(keys, visit, finish)
  for first = 1, #keys, CHUNK * KEY do
    local last = math.min(first + CHUNK * KEY, #keys + 1) - KEY
    local numbers, fields, contents, places = {}, {}, {}, {}
    for at = first, last, KEY do
      local number = bucket_at(keys, at)
      places[#places + 1] = number
      if contents[number] == nil then
        contents[number] = ''
        numbers[#numbers + 1] = number
        fields[#fields + 1] = field(number)
      end
    end
    for i, value in ipairs(call('HMGET', shard, unpack(fields))) do
      if value then contents[numbers[i]] = value end
    end
    for i, number in ipairs(places) do
      visit(first + (i - 1) * KEY, number, contents)
    end
    finish(contents)
  end
end

local function split()
  if buckets == wide then narrow, wide = wide, wide * 2 end
  local from, to = buckets - narrow, buckets
  buckets = buckets + 1
  local value = call('HGET', shard, field(from))
  if not value then return end
  -- Neighbours that go the same way are cut out in one piece.
  local parts = { [true] = {}, [false] = {} }
  local start, way = 1, hash_at(value, 1) % wide == to
  for at = ENTRY + 1, #value, ENTRY do
    local goes = hash_at(value, at) % wide == to
    if goes ~= way then
      parts[way][#parts[way] + 1] = sub(value, start, at - 1)
      start, way = at, goes
    end
  end
  parts[way][#parts[way] + 1] = sub(value, start)
  local moved = table.concat(parts[true])
  if moved ~= '' then
    write({ [from] = table.concat(parts[false]), [to] = moved })
  end
end

local function merge()
  local from = buckets - 1
  local to = from - narrow
  buckets = buckets - 1
  merges = (merges + 1) % 4294967296
  set_widths()
  local value = call('HGET', shard, field(from))
  if value then
    write({ [from] = '', [to] = (call('HGET', shard, field(to)) or '') .. value })
  end
end

local function grow()
  while entries > buckets * LOAD do split() end
end

local function sparse()
  return entries > 0 and buckets > 1 and entries < buckets * LOAD / 4
end

local function shrink(steps)
  while steps > 0 and sparse() do
    merge()
    steps = steps - 1
  end
end

-- The set of holder numbers in a packed list.
local function holders(packed)
  local set = {}
  for at = 1, #packed, 2 do set[sub(packed, at, at + 1)] = true end
  return set
end

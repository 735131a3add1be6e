-- A host's changes in a shard. KEYS: shard. ARGV: the host's number, the live hosts' numbers, keys
-- gone, keys new (all packed). Answers how many of the new keys another live host has too.
-- A key that is both gone and new is held afterwards.

local mine, live = ARGV[1], holders(ARGV[2])
live[mine] = nil
local held = 0

load_shard()

local changed
local function remove(at, number, contents)
  local key = sub(ARGV[3], at, at + KEY - 1)
  local value = contents[number]
  local found = entry_at(value, key .. mine, 1)
  if not found then return end
  value = without(value, found)
  contents[number], changed[number] = value, value
  entries = entries - 1
  if not entry_at(value, key, 1) then distinct = distinct - 1 end
end

changed = {}
each_key(ARGV[3], remove, function()
  write(changed)
  changed = {}
end)

-- Keys of this call that were looked at, and what each bucket gets.
local seen, added = {}, {}
local function add(at, number, contents)
  local key = sub(ARGV[4], at, at + KEY - 1)
  if seen[key] then return end
  seen[key] = true
  local value = contents[number]
  local found = entry_at(value, key, 1)
  if found then
    local own, other = false, false
    repeat
      local holder = sub(value, found + KEY, found + KEY + 1)
      if holder == mine then own = true elseif live[holder] then other = true end
      found = entry_at(value, key, found + ENTRY)
    until not found or (own and other)
    if other then held = held + 1 end
    if own then return end
  else
    distinct = distinct + 1
  end
  entries = entries + 1
  added[number] = (added[number] or '') .. key .. mine
end

each_key(ARGV[4], add, function(contents)
  for number, more in pairs(added) do added[number] = contents[number] .. more end
  write(added)
  added = {}
  grow()
end)
shrink(#ARGV[3] / KEY)
save_shard()
return held

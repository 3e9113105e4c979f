"""The queue's transactions: Lua scripts that the broker runs as one step each.

Every script that writes starts with a marker or with what the group holds as pending, so that running it twice (a
retry after a lost reply) changes nothing more. Without the flag `allow-oom` the server refuses a script before its
first write when it is out of memory. Keys are named by `keys`; bodies are JSON made by `bus`. Plain Redis 7: nothing
here is Valkey's own.
"""

PUBLISH_PLAN = """#!lua
-- Makes the run's batch group too: a trainer could not do so, and so not drain, once the server is out of memory.
-- KEYS: plan marker, work stream, batch stream, blob...
-- ARGV: fingerprint, reply, marker ttl, gate, blob ttl, batch group, blob count, blob..., unit body...
-- Returns {'stored', fingerprint, reply}, {'full', waiting} or {'published'}.
local stored = redis.call('HMGET', KEYS[1], 'fingerprint', 'reply')
if stored[1] then return {'stored', stored[1], stored[2]} end
local blobs = tonumber(ARGV[7])
local units = #ARGV - 7 - blobs
local waiting = redis.call('XLEN', KEYS[2])
if waiting > 0 and waiting + units > tonumber(ARGV[4]) then return {'full', waiting} end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[1], 'reply', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.pcall('XGROUP', 'CREATE', KEYS[3], ARGV[6], '0', 'MKSTREAM')  -- fails when it is there
for i = 1, blobs do redis.call('SET', KEYS[3 + i], ARGV[7 + i], 'EX', ARGV[5]) end
for i = 8 + blobs, #ARGV do redis.call('XADD', KEYS[2], '*', 'body', ARGV[i]) end
return {'published'}
"""

ANSWER_UNIT = """#!lua
-- The batch's blob has been written under another name, since scripts are slow at large values. The init blob stays:
-- a batch's until it is taken in, a dead letter's until that is dropped.
-- KEYS: done marker, work stream, batch stream, dead stream, batch blob, staged blob ('' twice for none)
-- ARGV: token, marker ttl, group, entry id, batch body, blob ttl, dead letter ('' for none), dead limit
-- Returns 1 when this delivery's answer is the published one, else 0; -1 when the staged blob is gone.
local blob = KEYS[6] ~= ''
if blob and redis.call('EXISTS', KEYS[6]) == 0 and redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
if redis.call('XACK', KEYS[2], ARGV[3], ARGV[4]) == 1 then  -- else the unit is answered, or taken off the queue
    redis.call('XDEL', KEYS[2], ARGV[4])
    if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then
        if blob then
            redis.call('RENAME', KEYS[6], KEYS[5])
            redis.call('EXPIRE', KEYS[5], ARGV[6])
        end
        redis.call('XADD', KEYS[3], '*', 'body', ARGV[5])
        if ARGV[7] ~= '' then redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[8], '*', 'body', ARGV[7]) end
    end
end
if blob then redis.call('UNLINK', KEYS[6]) end
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
return 0
"""

CLAIM = """#!lua flags=allow-oom
-- The next entry of a group: one that was neither acked nor renewed for the idle limit, else one nobody has had yet.
-- KEYS: stream   ARGV: group, consumer, idle limit in ms   Returns {entry id, fields, deliveries}, or nil for none.
local cursor = '0-0'
repeat
    local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], cursor, 'COUNT', 1)
    local entry = reply[2][1]
    if entry then
        local held = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
        return {entry[1], entry[2], held[1][4]}
    end
    cursor = reply[1]
until cursor == '0-0'
local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
if not reply then return false end
local entry = reply[1][2][1]
return {entry[1], entry[2], 1}
"""

REJECT = """#!lua
-- Moves an entry that no reader can parse.   KEYS: stream, dead stream   ARGV: group, entry id, dead letter, dead limit
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 1 then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'body', ARGV[3])
    redis.call('XDEL', KEYS[1], ARGV[2])
end
"""

ACK_BATCH = """#!lua flags=allow-oom
-- Takes an admitted batch off the queue; a script because Redis 7 refuses every command of a MULTI when out of memory.
-- KEYS: batch stream, blob, init blob   ARGV: group, entry id
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('UNLINK', KEYS[2], KEYS[3])
"""

REPLACE_BATCH = """#!lua flags=allow-oom
-- Takes a batch that cannot be read off the queue, and puts its work unit, or a dead letter, in its place. A unit's
-- marker goes, so that it can be answered again. The batch is larger than what replaces it, so memory is freed.
-- KEYS: batch stream, done marker, work or dead stream, blob   ARGV: group, entry id, body, dead limit ('' for a unit)
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[2])
    redis.call('UNLINK', KEYS[4])
    if ARGV[4] == '' then
        redis.call('UNLINK', KEYS[2])
        redis.call('XADD', KEYS[3], '*', 'body', ARGV[3])
    else
        redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', 'body', ARGV[3])
    end
end
"""

RETRY_DEAD = """#!lua
-- Turns a dead letter into the work unit that it is about, which can then be answered again.
-- KEYS: dead stream, done marker, work stream, init blob   ARGV: letter id, unit body, gate, blob ttl ('' for none)
-- Returns 'retried', 'unknown', 'blob missing' or 'full'.
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return 'unknown' end
if ARGV[4] ~= '' and redis.call('EXISTS', KEYS[4]) == 0 then return 'blob missing' end
if redis.call('XLEN', KEYS[3]) >= tonumber(ARGV[3]) then return 'full' end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('UNLINK', KEYS[2])
if ARGV[4] ~= '' then redis.call('EXPIRE', KEYS[4], ARGV[4]) end
redis.call('XADD', KEYS[3], '*', 'body', ARGV[2])
return 'retried'
"""

PUT_BACK = """#!lua flags=allow-oom
-- Moves a unit to the stream's tail, as a new entry, while its run's batch gate is reached. Frees what it takes.
-- KEYS: work stream, batch stream   ARGV: group, entry id, consumer, deliveries, gate
-- Returns 0 when the unit is this delivery's to make now, else 1.
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1, ARGV[3])  -- fails without the group
if held.err or #held == 0 or held[1][4] ~= tonumber(ARGV[4]) then return 1 end
if redis.call('XLEN', KEYS[2]) < tonumber(ARGV[5]) then return 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('XADD', KEYS[1], '*', unpack(entry[2]))
return 1
"""

RELEASE = """#!lua flags=allow-oom
-- Gives up an entry that is still this delivery's: others may take it at once, and this delivery does not count.
-- KEYS: stream   ARGV: group, entry id, consumer, deliveries
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1, ARGV[3])  -- fails without the group
if held.err or #held == 0 or held[1][4] ~= tonumber(ARGV[4]) then return end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[2], 'IDLE', 86400000, 'RETRYCOUNT', ARGV[4] - 1, 'JUSTID')
"""

TELL = """#!lua flags=allow-oom
-- Replaces a short-lived body, and enters its name in an index when there is one. Small: operators want to see what is
-- wrong when the server is out of memory.   KEYS: body, index   ARGV: body, ttl, name
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if KEYS[2] then redis.call('SADD', KEYS[2], ARGV[3]) end
"""

KEEP_CHOICE = """#!lua flags=allow-oom
-- KEYS: choice   ARGV: body, ttl
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
"""

RENEW = """#!lua flags=allow-oom
-- Resets the idle time of an entry that is still this delivery's.   KEYS: stream
-- ARGV: group, entry id, consumer, deliveries   Returns 1, or 0 when another delivery holds it or it is gone.
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1, ARGV[3])  -- fails without the group
if held.err or #held == 0 or held[1][4] ~= tonumber(ARGV[4]) then return 0 end
return #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[2], 'JUSTID')
"""

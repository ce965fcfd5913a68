-- KEYS: lease. ARGV: owner, fence, ttl in milliseconds. Returns 1, or 0 when the lease is another's.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'expires', now + ARGV[3])
return 1

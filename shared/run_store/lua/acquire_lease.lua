-- KEYS: lease, a hash of fence, owner, expires (milliseconds). ARGV: owner, ttl in milliseconds.
-- Returns the new fence, or false while another owner holds the lease.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('HMGET', KEYS[1], 'owner', 'expires')
if lease[1] and lease[1] ~= ARGV[1] and now < tonumber(lease[2]) then return false end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'expires', now + ARGV[2])
return redis.call('HINCRBY', KEYS[1], 'fence', 1)

-- KEYS: lease. ARGV: owner, fence. The fence stays, since the next one must be larger.
local lease = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if lease[1] == ARGV[1] and lease[2] == ARGV[2] then redis.call('HDEL', KEYS[1], 'owner') end

-- KEYS: journal. ARGV: position, sender. Returns the sender that stands at the position.
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGET', KEYS[1], ARGV[1])

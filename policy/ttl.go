package policy

import "time"

// DefaultTTL returns the life of a value that a client has written without saying how long it lives; 0 means
// forever. random, from [0,1), is the caller's random number: it spreads expiries evenly from TTL down to
// TTL*(1-Jitter), so that values written together do not expire together, and none outlives TTL.
//
// The result is a whole number of milliseconds, rounded down, because Redis counts in them; it is at
// least one if TTL is positive, because Redis refuses a life of zero. So only a TTL below 1 ms is exceeded.
func (r *Route) DefaultTTL(random float64) time.Duration {
	if r.TTL <= 0 {
		return 0
	}
	ttl := r.TTL - time.Duration(float64(r.TTL)*r.Jitter*random)
	return max(ttl.Truncate(time.Millisecond), time.Millisecond)
}

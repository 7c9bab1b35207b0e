package proxy

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	cmdtab "cacheproxy/internal/command"
)

// ownSection is our section of INFO, as its name is asked for.
const ownSection = "cacheproxy"

// infoRow is the row of INFO. Static.
var infoRow = cmdtab.Lookup([]byte("info"))

// info answers INFO: what Redis answers, and behind it a section of our own where a client asks for all or for the default, as
// Redis does with its own sections and those of modules. To ask for ours alone takes no Redis.
func (s *session) info(sl *slot) {
	ours, others := infoSections(sl.args[1:])
	switch {
	case !ours:
		s.forward(sl)
	case others:
		sl.then = func(frame []byte) {
			text, ok := bulk(frame)
			if !ok {
				s.finish(sl, frame) // an error
				return
			}
			text = bytes.Clone(text)
			proto := frameProto(frame)
			s.async(sl, func() []byte { return appendVerbatim(nil, "txt", s.srv.appendInfo(text), proto) })
		}
		s.forward(sl)
	default:
		s.begin(sl)
		proto := s.proto
		s.async(sl, func() []byte { return appendVerbatim(nil, "txt", s.srv.appendInfo(nil), proto) })
	}
}

// infoSections tells whether the arguments of INFO ask for our section, and whether for any other.
func infoSections(args [][]byte) (ours, others bool) {
	if len(args) == 0 {
		return true, true
	}
	for _, a := range args {
		switch {
		case foldEqual(a, ownSection):
			ours = true
		case foldEqual(a, "all"), foldEqual(a, "everything"), foldEqual(a, "default"):
			ours, others = true, true
		default:
			others = true
		}
	}
	return ours, others
}

// frameProto is the protocol version that a verbatim text or a bulk string was written in: that of the connection at that time.
func frameProto(frame []byte) int {
	if frameValue(frame)[0] == '=' {
		return 3
	}
	return 2
}

// appendInfo appends our section to the text of INFO. No field has the name of one of Redis's, because clients throw all
// sections into one dictionary; redis_hits, jsonb_hits and cache_misses are what they are called everywhere.
func (s *Server) appendInfo(b []byte) []byte {
	st := s.Figures()
	if len(b) > 0 {
		b = append(b, "\r\n"...) // as between Redis's own sections
	}
	line := func(key string, value any) { b = fmt.Appendf(b, "%s:%v\r\n", key, value) }
	b = append(b, "# Cacheproxy\r\n"...)
	line("proxy_version", s.cfg.Version)
	line("proxy_instance", s.e.id)
	line("proxy_uptime_in_seconds", st.Proxy.UptimeSeconds)
	line("proxy_draining", oneOrZero(st.Proxy.Draining))
	line("proxy_connected_clients", st.Proxy.Clients)
	line("proxy_accepted_connections", st.Proxy.ClientsAccepted)
	line("proxy_rejected_connections", st.Proxy.ClientsRefused)
	line("proxy_protocol_errors", st.Proxy.ProtocolErrors)
	line("proxy_commands_processed", st.Proxy.Commands)
	line("proxy_commands_unrouted", st.Proxy.Unrouted)
	line("proxy_commands_denied", st.Proxy.Denied)
	line("migration_phase", st.MigrationPhase)
	line("redis_hits", st.Performance.RedisHits)
	line("jsonb_hits", st.Performance.JSONBHits)
	line("cache_misses", st.Performance.CacheMisses)
	line("redis_hit_rate", st.Performance.RedisHitRate)
	line("overall_hit_rate", st.Performance.OverallHitRate)
	line("redis_status", st.Redis.Status)
	line("redis_status_reason", oneLine(st.Redis.Reason))
	line("redis_status_seconds", st.Redis.SinceSeconds)
	line("redis_breaker_opens", st.Redis.Opens)
	line("postgres_status", st.Postgres.Status)
	line("postgres_status_reason", oneLine(st.Postgres.Reason))
	line("postgres_status_seconds", st.Postgres.SinceSeconds)
	line("postgres_breaker_opens", st.Postgres.Opens)
	line("journal_redis_stale", st.Journal.RedisStale)
	line("journal_store_stale", st.Journal.StoreStale)
	line("journal_oldest_seconds", st.Journal.OldestSeconds)
	line("journal_redis_stale_oldest_seconds", st.Journal.RedisStaleOldest)
	line("journal_store_stale_oldest_seconds", st.Journal.StoreStaleOldest)
	line("journal_redis_stale_longest_seconds", st.Journal.RedisStaleLongest)
	line("journal_store_stale_longest_seconds", st.Journal.StoreStaleLongest)
	for _, cause := range slices.Sorted(maps.Keys(st.Journal.Repairs)) {
		line("journal_repairs_"+cause, st.Journal.Repairs[cause])
	}
	line("proxy_promotions", st.Proxy.Promotions)
	line("proxy_promotions_refused", st.Proxy.PromotionsRefused)
	line("proxy_promotions_failed", st.Proxy.PromotionsFailed)
	line("proxy_lost_leases", st.Proxy.LostLeases)
	line("proxy_shed", st.Proxy.Shed)
	line("proxy_uncertain", st.Proxy.Uncertain)
	line("proxy_fences", st.Proxy.Fences)
	line("proxy_numbers_lifted", st.Proxy.NumbersLifted)
	for i, r := range st.Routes {
		text := fmt.Sprintf("name=%s,phase=%s,redis_hits=%d,jsonb_hits=%d,cache_misses=%d,writes=%d,refused=%d,no_row=%d,verify_checked=%d,verify_dropped=%d",
			r.Name, r.Phase, r.RedisHits, r.JSONBHits, r.CacheMisses, r.Writes, r.Refused, r.NoRow, r.Verified, r.Unverified)
		for _, kind := range slices.Sorted(maps.Keys(r.Mismatches)) {
			text += fmt.Sprintf(",verify_%s=%d", kind, r.Mismatches[kind])
		}
		line(fmt.Sprintf("route%d", i), text)
	}
	return b
}

// oneLine keeps a text within its line.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

func oneOrZero(b bool) int {
	if b {
		return 1
	}
	return 0
}

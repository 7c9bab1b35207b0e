package config

import "cacheproxy/policy"

// PolicyRoutes are the routes in the form that the data path uses, in the order in which they are
// tried. The receiver must come from Load or Defaults, which let only words through that are known
// here; a word that is not known counts as the weakest: phase0, miss, any.
func (c *Config) PolicyRoutes() []policy.Route {
	routes := make([]policy.Route, len(c.Routes))
	for i, r := range c.Routes {
		phase, _ := policy.ParsePhase(r.Phase)
		routes[i] = policy.Route{
			Name:        r.Name,
			Match:       r.Match,
			Template:    r.template(),
			Place:       r.place(),
			Phase:       phase,
			TTL:         r.TTL,
			Jitter:      float64(r.TTLJitter),
			NegativeTTL: r.NegativeTTL,
			OnUnknown:   policy.UnknownMiss,
			WritePolicy: policy.WriteAny,
		}
		if r.OnUnknown == "error" {
			routes[i].OnUnknown = policy.UnknownError
		}
		if r.WritePolicy == "both" {
			routes[i].WritePolicy = policy.WriteBothStores
		}
	}
	return routes
}

// UsesStore reports whether any route is in a phase that has a store. Without one, Postgres is not
// even connected.
func (c *Config) UsesStore() bool {
	for _, r := range c.PolicyRoutes() {
		if r.Phase.Rules().UsesStore {
			return true
		}
	}
	return false
}

package fallback

import "cacheproxy/policy"

// Column says which column of which table of the application holds the values of a route.
type Column struct {
	Route string
	// Table is the table's name, with its schema: public.reports. Without one it is that of the schema public.
	Table string
	// Keys are the columns of the key, in the order of the template's placeholders.
	Keys []string
	// Value is the column of type jsonb that holds the value.
	Value string
	// Expires is a column of type timestamptz that says until when the value counts; "": the route has none, and what
	// the proxy is told of a key's life stands in cacheproxy.meta.
	Expires string
	// Updated is a column of type timestamptz that says when the row was last changed; "": there is none.
	Updated string
	// Template is the pattern of the route's keys.
	Template *policy.Template
}

// JSON tells whether a column of type jsonb can hold value: whether it is JSON, and such that every Postgres takes it and
// gives it back. Commit refuses what is not (see BadData).
func JSON(value []byte) bool {
	_, ok := gate(value)
	return ok
}

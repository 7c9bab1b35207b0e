-- The tables of cacheproxy, all in one schema. Every statement may be repeated.

DO $$
BEGIN
    -- Not CREATE SCHEMA IF NOT EXISTS: that asks for the right to create schemas even when it has nothing to do.
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'cacheproxy') THEN
        CREATE SCHEMA cacheproxy;
    END IF;
END
$$;

-- One row per key. value is the view for queries; raw holds the exact bytes where they differ from value::text
-- or are not JSON. A row with neither is a tombstone: the key is known to be deleted. A row that has expired counts
-- as one, and the sweep makes it one.
CREATE TABLE IF NOT EXISTS cacheproxy.entries (
    key        text COLLATE "C" PRIMARY KEY,
    value      jsonb,
    raw        bytea,
    route      text COLLATE "C" NOT NULL,
    generation bigint NOT NULL,             -- the row is dead while a fence of its route or of '' stands higher
    expires_at timestamptz,                 -- NULL: never
    updated_at timestamptz NOT NULL         -- when it was last written, on this server's clock; where the sweep made
                                            -- a tombstone of an expired row: when it expired, if that was later
) WITH (
    -- A cache rewrites its rows: with the default of a fifth, a large table would carry millions of dead
    -- versions between two vacuums.
    autovacuum_vacuum_scale_factor = 0.05
);
-- What changed since a moment: read after a failover of Redis.
CREATE INDEX IF NOT EXISTS entries_updated_at ON cacheproxy.entries (updated_at);
-- The next three serve the sweep: expired rows, old tombstones, rows below a fence.
CREATE INDEX IF NOT EXISTS entries_expires_at ON cacheproxy.entries (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_tombstones ON cacheproxy.entries (updated_at) WHERE value IS NULL AND raw IS NULL;
CREATE INDEX IF NOT EXISTS entries_generation ON cacheproxy.entries (route, generation);

-- Keys for which Redis may be stale. Written with changes that Redis could not be told of, struck as soon as it is right
-- again, polled by every sidecar.
CREATE TABLE IF NOT EXISTS cacheproxy.journal (
    id         bigserial PRIMARY KEY,
    keys       text[] NOT NULL,
    routes     text[] NOT NULL,             -- routes[i] is the route of keys[i]
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (cardinality(keys) = cardinality(routes))
) WITH (
    -- The table is nearly empty and churns: every row lives for milliseconds, and each poll walks over the dead
    -- ones at the front of the index. So vacuum by count and not by share, often, and without holding back.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0
);

-- The rising number that writers draw under the locks of their keys. CACHE must stay 1: a session that drew
-- numbers in advance would use them after higher ones.
CREATE SEQUENCE IF NOT EXISTS cacheproxy.fence AS bigint CACHE 1;

-- Fences. scope is a route, or '' for the whole store; the current generation is the highest of all.
CREATE TABLE IF NOT EXISTS cacheproxy.generations (
    scope      text COLLATE "C" PRIMARY KEY,
    generation bigint NOT NULL
);

-- The phases in which routes have been served.
CREATE TABLE IF NOT EXISTS cacheproxy.phases (
    route     text COLLATE "C",
    phase     text COLLATE "C",
    since     timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    PRIMARY KEY (route, phase)
);

-- What a column of the application cannot hold of a key: one row per key that was changed through the proxy, or recorded by
-- a trigger that `cacheproxy schema --route` prints.
CREATE TABLE IF NOT EXISTS cacheproxy.meta (
    route      text COLLATE "C",
    key        text COLLATE "C",
    expires_at timestamptz,                 -- NULL: never, or the column has a neighbour that says so
    digest     bytea,                       -- of the value that expires_at speaks of
    dropped    boolean NOT NULL DEFAULT false, -- an empty column is no delete: Redis holds the value
    generation bigint NOT NULL,
    updated_at timestamptz NOT NULL,
    change     bigint,                      -- of a change that Redis is to be told of: its number in the order of the journal
    PRIMARY KEY (route, key)
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX IF NOT EXISTS meta_updated_at ON cacheproxy.meta (updated_at);
CREATE INDEX IF NOT EXISTS meta_change ON cacheproxy.meta (change) WHERE change IS NOT NULL;
-- How far `cacheproxy migrate` has got, for --resume.
CREATE TABLE IF NOT EXISTS cacheproxy.transfers (
    route      text COLLATE "C",
    direction  text COLLATE "C",
    state      jsonb NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (route, direction)
);

-- The table. Everything in it was measured in this run.
CREATE FUNCTION demo.ms(milliseconds double precision) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT to_char(round(milliseconds::numeric), 'FM999,990') || ' ms'
$$;

\pset footer off
WITH events AS (
    SELECT c.way, count(*) AS committed, count(*) FILTER (WHERE a.position IS NULL) AS lost
    FROM demo.committed AS c
    LEFT JOIN demo.applied AS a USING (way, position)
    GROUP BY c.way
), lags AS (
    SELECT way, percentile_disc(0.5) WITHIN GROUP (ORDER BY age) AS half, max(age) AS most
    FROM demo.applied
    GROUP BY way
), writers AS (
    SELECT way, percentile_disc(ARRAY[0.5, 0.99, 1]) WITHIN GROUP (ORDER BY milliseconds) AS took
    FROM demo.latencies
    GROUP BY way
)
SELECT names.name AS "projection reads by",
       to_char(committed, 'FM999,990') AS "events committed",
       to_char(lost, 'FM999,990') AS "events lost",
       demo.ms(extract(epoch FROM half) * 1000) AS "its lag: p50",
       demo.ms(extract(epoch FROM most) * 1000) AS "max",
       demo.ms(took[1]) AS "writers: p50",
       demo.ms(took[2]) AS "p99",
       demo.ms(took[3]) AS "max"
FROM (VALUES (1, '1 position > last seen'), (2, '2 queued exclusive lock'), (3, '3 lockstep.projection_claim')) AS names (way, name)
JOIN events USING (way)
JOIN lags USING (way)
JOIN writers USING (way)
ORDER BY way;

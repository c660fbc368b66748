// The control in Node: bare INSERTs and the unprotected position loop (see insert.py), through node-pg with named prepared statements. The
// loop reads into the client and applies each event from there, in one transaction with the cursor, as Emmett's consumer does.
// Docs: https://node-postgres.com/features/queries#prepared-statements
const { Pool, types } = require("pg");

types.setTypeParser(types.builtins.NUMERIC, (text) => text);

module.exports = async ({ sleep }) => {
    const pool = new Pool({ max: 100 });
    const insert = (client, id, sequence, data) => client.query({
        name: "insert",
        text: `INSERT INTO bench.events
            (tenant, position, aggregate_type, aggregate_id, sequence, event_type, event_id, payload, metadata, created_at)
            VALUES ('', nextval('bench.position'), 'order', $1, $2, 'paid', NULL, $3, NULL, clock_timestamp())`,
        values: [id, sequence, data],
    });
    return {
        append: async (id, sequence, data) => { await insert(pool, id, sequence, data); },

        async appendHot(data) {
            const client = await pool.connect();
            await client.query("BEGIN");
            const { rows } = await client.query({
                name: "next",
                text: `INSERT INTO bench.heads AS h VALUES ('hot', 1)
                    ON CONFLICT (aggregate_id) DO UPDATE SET sequence = h.sequence + 1 RETURNING sequence`,
            });
            await insert(client, "hot", rows[0].sequence, data);
            await client.query("COMMIT");
            client.release();
        },

        async consume(consumer, size, poll, ended) {
            const client = await pool.connect();
            for (;;) {
                await client.query("BEGIN");
                const { rows: [{ position }] } = await client.query({
                    name: "cursor", text: "SELECT position FROM bench.cursors WHERE consumer = $1 FOR UPDATE", values: [consumer],
                });
                const { rows } = await client.query({
                    name: "read",
                    text: `SELECT position, aggregate_id, sequence, event_type, payload FROM bench.events
                        WHERE tenant = '' AND position > $1 ORDER BY position LIMIT $2`,
                    values: [position, size],
                });
                for (const event of rows) {
                    await client.query({ name: "apply", text: "INSERT INTO bench.applied VALUES ($1, $2)", values: [consumer, event.position] });
                }
                if (rows.length > 0) {
                    await client.query({
                        name: "advance", text: "UPDATE bench.cursors SET position = $2 WHERE consumer = $1",
                        values: [consumer, rows[rows.length - 1].position],
                    });
                }
                await client.query("COMMIT");
                if (ended(rows.length)) {
                    return client.release();
                }
                if (rows.length < size) {
                    await sleep(poll);
                }
            }
        },

        end: () => pool.end(),
    };
};

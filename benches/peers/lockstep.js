// lockstep through node-pg, with named prepared statements: appends with expected_sequence, the consumer as docs/projection.md shows it (claim,
// apply each event, advance, commit), jobs as docs/job.md does. Positions stay text.
const { Pool, types } = require("pg");

types.setTypeParser(types.builtins.NUMERIC, (text) => text);

module.exports = async ({ sleep }) => {
    const pool = new Pool({ max: 100 });
    return {
        append: (id, sequence, data) => pool.query({
            name: "push", text: "SELECT * FROM lockstep.push_event('order', $1, 'paid', $2, $3)", values: [id, data, sequence - 1],
        }).then(() => 0),

        appendHot: (data) => pool.query({
            name: "push hot", text: "SELECT * FROM lockstep.push_event('order', 'hot', 'paid', $1)", values: [data],
        }).then(() => 0),

        async consume(consumer, size, poll, ended) {
            const client = await pool.connect();
            for (;;) {
                await client.query("BEGIN");
                const { rows } = await client.query({
                    name: "claim",
                    text: `SELECT position, aggregate_id, sequence, event_type, payload
                        FROM lockstep.projection_claim($1, max_events => $2, barrier => false)`,
                    values: [`consumer ${consumer}`, size],
                });
                for (const event of rows) {
                    await client.query({ name: "apply", text: "INSERT INTO bench.applied VALUES ($1, $2)", values: [consumer, event.position] });
                }
                if (rows.length > 0) {
                    await client.query({ name: "advance", text: "SELECT lockstep.projection_advance($1)", values: [`consumer ${consumer}`] });
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

        fill: (n) => pool.query(
            "SELECT lockstep.job_enqueue('bench', $2 || n::text, 'work', '{\"n\": 1}') FROM generate_series(1, $1) AS n", [n, `fill ${Date.now()} `],
        ),

        enqueue: (key) => pool.query({
            name: "enqueue", text: "SELECT * FROM lockstep.job_enqueue('bench', $1, 'work', '{\"n\": 1}')", values: [key],
        }).then(() => 0),

        async work(workers, state, running) {
            await Promise.all(Array.from({ length: workers }, async () => {
                const client = await pool.connect();
                while (running()) {
                    const { rows } = await client.query({ name: "take", text: "SELECT * FROM lockstep.job_claim('bench', 'bench')" });
                    if (rows.length === 0) {
                        throw new Error("no job is left");
                    }
                    await client.query({ name: "complete", text: "SELECT lockstep.job_complete($1, $2)", values: [rows[0].job_id, rows[0].token] });
                    state.done += 1;
                }
                client.release();
            }));
        },

        end: () => pool.end(),
    };
};

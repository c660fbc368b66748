// The hand-made queue (see skip_locked.py) through node-pg, with named prepared statements: the control of the queues in Node.
const { Pool } = require("pg");

module.exports = async () => {
    const pool = new Pool({ max: 100 });
    return {
        fill: (n) => pool.query("INSERT INTO queue (key, kind, payload) SELECT n::text, 'work', '{\"n\": 1}' FROM generate_series(1, $1) AS n", [n]),

        enqueue: (key) => pool.query({
            name: "enqueue", text: "INSERT INTO queue (key, kind, payload) VALUES ($1, 'work', '{\"n\": 1}') RETURNING id", values: [key],
        }).then(() => 0),

        async work(workers, state, running) {
            await Promise.all(Array.from({ length: workers }, async () => {
                const client = await pool.connect();
                while (running()) {
                    await client.query("BEGIN");
                    const { rows } = await client.query({
                        name: "take",
                        text: "SELECT * FROM queue WHERE run_at <= now() ORDER BY priority DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED",
                    });
                    if (rows.length === 0) {
                        throw new Error("no job is left");
                    }
                    await client.query({ name: "complete", text: "DELETE FROM queue WHERE id = $1", values: [rows[0].id] });
                    await client.query("COMMIT");
                    state.done += 1;
                }
                client.release();
            }));
        },

        end: () => pool.end(),
    };
};

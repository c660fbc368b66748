// graphile-worker 0.17.3 (npm): jobs by addJob with a jobKey each, worked on by run() with so many at once in this process, which is woken by
// LISTEN and claims by itself. Its schema is its own migration's.
// Docs: https://worker.graphile.org/docs/library/run, https://worker.graphile.org/docs/library/add-job
const { Pool } = require("pg");
const { run, makeWorkerUtils, Logger } = require("graphile-worker");

module.exports = async () => {
    const pool = new Pool({ max: 100 });
    pool.on("error", (error) => { throw error; });
    pool.on("connect", (client) => client.on("error", (error) => { throw error; }));
    const logger = new Logger(() => () => {});
    const utils = await makeWorkerUtils({ pgPool: pool, logger });
    await utils.migrate();
    return {
        async fill(n) {
            for (let from = 0; from < n; from += 1000) {
                await pool.query(
                    `SELECT count(*) FROM graphile_worker.add_jobs(ARRAY(
                        SELECT json_populate_record(NULL::graphile_worker.job_spec,
                            json_build_object('identifier', 'work', 'payload', '{"n": 1}'::json, 'job_key', $1 || n::text))
                        FROM generate_series(1, $2) AS n))`,
                    [`fill ${Date.now()} ${from} `, Math.min(1000, n - from)],
                );
            }
        },
        enqueue: (key) => utils.addJob("work", { n: 1 }, { jobKey: key }).then(() => 0),
        async work(workers, state, running) {
            const runner = await run({
                pgPool: pool, logger, concurrency: workers, noHandleSignals: true, taskList: { work: () => { state.done += 1; } },
            });
            while (running()) {
                await new Promise((resolve) => setTimeout(resolve, 10));
            }
            await runner.stop(); // waits for what has begun
        },
        end: async () => { await utils.release(); await pool.end(); },
    };
};

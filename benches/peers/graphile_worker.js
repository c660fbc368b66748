// graphile-worker 0.17.3 (npm): jobs by addJob with a jobKey each, worked on by run() with so many at once in this process, which is woken by
// LISTEN and claims by itself. Its schema is its own migration's.
// Docs: https://worker.graphile.org/docs/library/run, https://worker.graphile.org/docs/library/add-job
const { Pool } = require("pg");
const { run, makeWorkerUtils, Logger } = require("graphile-worker");

module.exports = async () => {
    const pool = new Pool({ max: 100 });
    const logger = new Logger(() => () => {});
    const utils = await makeWorkerUtils({ pgPool: pool, logger });
    await utils.migrate();
    return {
        fill: (n) => pool.query("SELECT graphile_worker.add_job('work', '{\"n\": 1}', job_key => n::text) FROM generate_series(1, $1) AS n", [n]),
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
